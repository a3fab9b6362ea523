//! What can go wrong with a patch, in words for its operator, and sorted for a control plane.
//!
//! Each message says what was found, where, and what to do. Every one of these leaves the guest running as before the call,
//! except [`PatchError::Undo`], which says so.

use introspect::Gva;

use crate::machine::MachineError;

/// What sort of failure a [`PatchError`] is: what its reader can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The file is no patch for this guest; trying again will not help.
    BadPatch,
    /// The patch needs what outpatch cannot do yet.
    Unsupported,
    /// No such patch or task.
    NotFound,
    /// What is asked for does not fit the present state (already applied, a transition runs, the site is in use).
    Conflict,
    /// The guest was in the middle of something for as long as we tried; try again.
    Busy,
    /// The guest's kernel is not up yet; try again later.
    NotReady,
    /// The guest's memory is not what a Linux kernel's is.
    Guest,
    /// The machine below failed.
    Machine,
}

/// Why an operation on a guest failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The machine refused an operation.
    #[error(transparent)]
    Machine(#[from] MachineError),

    /// A write failed, and so did putting back what was already written.
    #[error("{cause}; putting the guest back as it was failed too ({undo}): stop this guest")]
    Undo {
        /// The failure that made us undo.
        cause: Box<PatchError>,
        /// The failure of the undo.
        undo: MachineError,
    },

    /// No kernel in the guest that we can work with yet.
    #[error("the guest's kernel is not up yet: {0}")]
    NotReady(String),

    /// The guest's memory could not be made sense of.
    #[error("guest kernel: {0}")]
    Guest(String),

    /// The guest has started another kernel by itself.
    #[error(
        "the guest no longer runs the kernel that it did ({0}): it has started another one, and what was patched is gone with the old one; ask again"
    )]
    AnotherKernel(String),

    /// The guest holds a lock, or is doing something, that makes a change unsafe now.
    #[error("the guest was busy in each of {tries} looks: {what}; try again")]
    Busy {
        /// What was in the way at the last look.
        what: String,
        /// How often we looked.
        tries: u32,
    },

    /// The file is not a livepatch module for this guest.
    #[error("{0}")]
    BadPatch(String),

    /// The patch, or the guest, needs what is not there yet.
    #[error("{0} (not supported yet)")]
    Unsupported(String),

    /// A patch of this name is in the guest.
    #[error("patch {0} is already in the guest; revert it first")]
    AlreadyApplied(String),

    /// The guest itself has loaded a module of this name, which would patch the same functions.
    #[error("the guest itself has loaded module {0}; remove it there first")]
    LoadedInGuest(String),

    /// A transition is running; there is one at a time.
    #[error("patch {0} is in transition; wait for it, or revert it")]
    InTransition(String),

    /// Not everybody could be moved in one pause.
    #[error("not all tasks can be moved in one pause: {blocker}{}; move them per task, or try again", and_more(.others))]
    NotAtOnce {
        /// A task in the way, and where it is: one that is in the functions, if any is.
        blocker: String,
        /// How many more there are.
        others: usize,
    },

    /// There is no transition to do it to.
    #[error("patch {0} is not in transition")]
    NoTransition(String),

    /// No patch of this name.
    #[error("no patch named {0} is applied")]
    NoSuchPatch(String),

    /// No task with this pid.
    #[error("no task with pid {0}")]
    NoSuchTask(i32),

    /// The function's entry cannot be redirected.
    #[error("function {function} at {at}: {why}")]
    Site {
        /// The function.
        function: String,
        /// Its address.
        at: Gva,
        /// Why not, with the name of who uses it.
        why: String,
    },

    /// No room for the patch in the guest.
    #[error("no room in the guest: {0}")]
    NoRoom(String),
}

fn and_more(count: &usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    }
}

impl PatchError {
    /// What sort of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            PatchError::Machine(_) | PatchError::Undo { .. } => ErrorKind::Machine,
            PatchError::NotReady(_) => ErrorKind::NotReady,
            PatchError::Guest(_) | PatchError::AnotherKernel(_) => ErrorKind::Guest,
            PatchError::Busy { .. } => ErrorKind::Busy,
            PatchError::Unsupported(_) | PatchError::NoRoom(_) => ErrorKind::Unsupported,
            PatchError::BadPatch(_) => ErrorKind::BadPatch,
            PatchError::AlreadyApplied(_)
            | PatchError::LoadedInGuest(_)
            | PatchError::InTransition(_)
            | PatchError::NoTransition(_)
            | PatchError::NotAtOnce { .. }
            | PatchError::Site { .. } => ErrorKind::Conflict,
            PatchError::NoSuchPatch(_) | PatchError::NoSuchTask(_) => ErrorKind::NotFound,
        }
    }
}
