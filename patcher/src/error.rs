//! What can go wrong with a patch, in words for the operator, and sorted for a control plane.
//!
//! Each message says what was found, where, and what to do. Every error leaves the guest running
//! as before the call, except [`PatchError::Undo`], which says so. Errors of `introspect` and of
//! the parts of this crate stay whole inside: [`source`](std::error::Error::source) leads to them.
//!
//! All conversions between errors of this crate are in this file.

use introspect::btf::BtfError;
use introspect::modules::ListingError;
use introspect::modules::ModulesError;
use introspect::{FindError, Gva, NotReady, ReadError, SymbolError, TasksError, UnwinderError};

use crate::ftrace::ops::FtraceOpsError;
use crate::ftrace::site::SiteError;
use crate::machine::MachineError;
use crate::memory::error::PatchMemoryError;
use crate::module::{LinkError, ModuleError, TargetError};
use crate::registration::users::CodeUser;
use crate::x86::EncodeError;

/// What sort of failure a [`PatchError`] is: what its reader can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The file is no patch for this guest. Trying again does not help.
    BadPatch,
    /// The patch, or the guest, needs what outpatch cannot do.
    Unsupported,
    /// There is no such patch or task.
    NotFound,
    /// The request does not fit the present state: the patch is applied already, a transition is
    /// running, the function's ftrace site is in use.
    Conflict,
    /// The guest's kernel has ended: it can only be read.
    Ended,
    /// The guest was in the middle of a change for as long as it was tried, or has started another
    /// kernel. Try again.
    Busy,
    /// The guest's kernel is not up yet. Try again later.
    NotReady,
    /// The guest's memory is not what a Linux kernel's is.
    Guest,
    /// The machine below failed.
    Machine,
    /// outpatch itself failed: a bug.
    Internal,
}

/// Why an operation on a guest failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// The machine refused an operation.
    #[error(transparent)]
    Machine(#[from] MachineError),

    /// A write failed, and so did the restoring of what was already written.
    #[error("{cause}; restoring the guest's memory failed too ({undo}): stop this guest")]
    Undo {
        /// The failure that the undo was for.
        #[source]
        cause: Box<PatchError>,
        /// The failure of the undo.
        undo: MachineError,
    },

    /// The guest's kernel is not up yet.
    #[error("the guest's kernel is not up yet: {0}")]
    NotReady(#[source] NotReady),

    /// The guest's memory does not show what a kernel's memory shows.
    #[error("guest kernel: {0}")]
    Guest(#[from] GuestError),

    /// The guest has started another kernel by itself (kexec).
    #[error(
        "the guest has started another kernel by itself (kexec), and the patches are gone with the \
         old one ({0}); repeat the request"
    )]
    AnotherKernel(String),

    /// The guest's kernel has panicked: it never runs a task again.
    #[error("the guest's kernel has panicked, so it cannot be changed")]
    Panicked,

    /// The guest holds a lock, or is doing something, that makes a change unsafe now.
    #[error("guest still busy after {tries} attempts ({what}); try again")]
    Busy {
        /// What the last attempt found.
        what: String,
        /// How many attempts there were.
        tries: u32,
    },

    /// The file is no livepatch module that this guest can take.
    #[error(transparent)]
    Module(#[from] LinkError),

    /// The patch is refused for several reasons.
    #[error("the patch is refused for {} reasons: {}", .0.len(), listed(.0))]
    Several(Vec<PatchError>),

    /// The guest lacks what the request needs.
    #[error("{0} (not supported yet)")]
    Unsupported(&'static str),

    /// A patch of this name is in the guest.
    #[error("patch {0} is already in the guest; revert it first")]
    AlreadyApplied(String),

    /// The guest itself has loaded a module of this name, which would patch the same functions.
    #[error("the guest itself has loaded module {0}; remove it there first")]
    LoadedInGuest(String),

    /// A transition is running. There is one at a time.
    #[error("patch {0} is in transition; wait until it completes, or reverse it (outpatch cancel)")]
    InTransition(String),

    /// Some tasks could not be switched in one pause.
    #[error(
        "cannot switch all tasks in one pause: {blocker}{}; retry, or use --mode per-task",
        and_more(.others)
    )]
    NotAtOnce {
        /// A task that blocks the transition, and the frame that keeps it from switching: one that
        /// is in a patched function, if any is.
        blocker: String,
        /// How many more tasks block it.
        others: usize,
    },

    /// The patch is not in transition.
    #[error("patch {0} is not in transition")]
    NoTransition(String),

    /// There is no patch of this name.
    #[error("no patch named {0} is applied")]
    NoSuchPatch(String),

    /// There is no task with this pid.
    #[error("no task with pid {0}")]
    NoSuchTask(i32),

    /// Something in the guest uses the code of a patch that is to be removed: a kprobe, an event of
    /// perf, a BPF program.
    #[error(
        "something in the guest (a kprobe, perf, BPF) uses the code of patch {patch}: {source}; \
         remove that use there first"
    )]
    InUse {
        /// The patch.
        patch: String,
        /// What shows it.
        source: CodeUser,
    },

    /// The function's entry cannot be redirected.
    #[error("function {function} at {at}: {source}")]
    Site {
        /// The function.
        function: String,
        /// Its address.
        at: Gva,
        /// Why not, with the name of what uses it.
        source: SiteError,
    },

    /// The guest has no memory for the patch, or took some back that outpatch uses.
    #[error(transparent)]
    Memory(#[from] PatchMemoryError),

    /// An instruction cannot be encoded for the addresses at hand.
    #[error(transparent)]
    Encode(#[from] EncodeError),

    /// outpatch itself is wrong somewhere.
    #[error("internal error: {0}; this is a bug in outpatch")]
    Internal(&'static str),

    /// More tasks have to switch than the patch has a table for (guests without livepatching).
    #[error(
        "more than {max} tasks have not switched, and the guest had fewer when the patch was \
         placed; try again"
    )]
    TooManyTasks {
        /// How many the table takes.
        max: u64,
    },
}

/// What in the guest's memory could not be read or made sense of.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// There is no kernel that can be read.
    #[error(transparent)]
    Kernel(#[from] FindError),
    /// The kernel lacks a symbol, or has several of the name.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The kernel's types lack something.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// Memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The task list cannot be read.
    #[error(transparent)]
    Tasks(#[from] TasksError),
    /// The list of modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The symbols of modules and of code made at run time cannot be read.
    #[error(transparent)]
    Symbols(#[from] ListingError),
    /// Stacks cannot be walked.
    #[error(transparent)]
    Unwinder(#[from] UnwinderError),
    /// ftrace's users cannot be read.
    #[error(transparent)]
    Ftrace(#[from] FtraceOpsError),
    /// The kernel's variables and types have values that no kernel has.
    #[error("{0}")]
    Unexpected(String),
}

/// Why a step of a transition was not taken.
#[derive(Clone, Debug)]
pub enum StepError {
    /// The guest is in the middle of this. Resume it and try again.
    Busy(String),
    /// Trying again does not help.
    Failed(PatchError),
}

/// The first of the reasons for which a patch is refused, numbered.
fn listed(reasons: &[PatchError]) -> String {
    const SHOWN: usize = 20;
    let shown: Vec<String> = (1..)
        .zip(reasons.iter().take(SHOWN))
        .map(|(number, reason)| format!("({number}) {reason}"))
        .collect();
    let more = match reasons.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!("{}{more}", shown.join("; "))
}

fn and_more(count: &usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    }
}

/// Values in the guest that no kernel has.
pub fn unexpected(what: impl Into<String>) -> PatchError {
    PatchError::Guest(GuestError::Unexpected(what.into()))
}

impl PatchError {
    /// The error of a patch that is refused for these reasons, of which there is at least one.
    pub(crate) fn of_reasons(reasons: Vec<PatchError>) -> PatchError {
        match <[PatchError; 1]>::try_from(reasons) {
            Ok([only]) => only,
            Err(none) if none.is_empty() => {
                PatchError::Internal("a patch was refused without a reason")
            }
            Err(several) => PatchError::Several(several),
        }
    }

    /// Whether the reason is the patch itself, so that it is worth telling what else is.
    pub(crate) fn is_of_patch(&self) -> bool {
        matches!(self, PatchError::Module(_) | PatchError::Site { .. })
    }

    /// What sort of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            PatchError::Machine(_) | PatchError::Undo { .. } => ErrorKind::Machine,
            PatchError::NotReady(_) => ErrorKind::NotReady,
            PatchError::Guest(_) => ErrorKind::Guest,
            PatchError::Panicked => ErrorKind::Ended,
            PatchError::AnotherKernel(_)
            | PatchError::Busy { .. }
            | PatchError::TooManyTasks { .. } => ErrorKind::Busy,
            PatchError::Unsupported(_) => ErrorKind::Unsupported,
            PatchError::Module(error) => link_kind(error),
            PatchError::Several(reasons) => kind_of_all(reasons),
            PatchError::Site { source, .. } => site_kind(source),
            PatchError::Memory(error) => memory_kind(error),
            PatchError::Encode(EncodeError::OutOfReach { .. }) => ErrorKind::Unsupported,
            PatchError::Encode(EncodeError::Assembler { .. }) | PatchError::Internal(_) => {
                ErrorKind::Internal
            }
            PatchError::AlreadyApplied(_)
            | PatchError::LoadedInGuest(_)
            | PatchError::InTransition(_)
            | PatchError::NoTransition(_)
            | PatchError::NotAtOnce { .. }
            | PatchError::InUse { .. } => ErrorKind::Conflict,
            PatchError::NoSuchPatch(_) | PatchError::NoSuchTask(_) => ErrorKind::NotFound,
        }
    }
}

/// The kind of the reason that no other attempt removes, if there is one.
fn kind_of_all(reasons: &[PatchError]) -> ErrorKind {
    let kinds: Vec<ErrorKind> = reasons.iter().map(PatchError::kind).collect();
    let lasting = [
        ErrorKind::BadPatch,
        ErrorKind::Unsupported,
        ErrorKind::Guest,
        ErrorKind::Conflict,
    ];
    let first = lasting.into_iter().find(|kind| kinds.contains(kind));
    first
        .or(kinds.first().copied())
        .unwrap_or(ErrorKind::Internal)
}

fn link_kind(error: &LinkError) -> ErrorKind {
    match error {
        LinkError::Used { source, .. } => link_kind(source),
        LinkError::Booting => ErrorKind::NotReady,
        LinkError::Target(_) => ErrorKind::Guest,
        LinkError::Dropped { .. } | LinkError::StaticKey { .. } => ErrorKind::Unsupported,
        LinkError::Module(error) if error.is_unsupported() => ErrorKind::Unsupported,
        _ => ErrorKind::BadPatch,
    }
}

fn site_kind(error: &SiteError) -> ErrorKind {
    match error {
        SiteError::None => ErrorKind::Unsupported,
        SiteError::Used(_) | SiteError::Foreign(_) | SiteError::Changed => ErrorKind::Conflict,
        SiteError::Read(_) | SiteError::Endless => ErrorKind::Guest,
    }
}

fn memory_kind(error: &PatchMemoryError) -> ErrorKind {
    match error {
        PatchMemoryError::TooLarge { .. }
        | PatchMemoryError::AlignmentTooLarge { .. }
        | PatchMemoryError::NoEntry => ErrorKind::Unsupported,
        PatchMemoryError::NoHiddenWindow { .. } | PatchMemoryError::TooMuchKept { .. } => {
            ErrorKind::Conflict
        }
        PatchMemoryError::Quarantined { .. } => ErrorKind::Busy,
        PatchMemoryError::EntryTaken(_) | PatchMemoryError::NotMapped(_) => ErrorKind::Guest,
    }
}

impl From<FindError> for PatchError {
    fn from(error: FindError) -> Self {
        match error {
            FindError::NotReady(why) => PatchError::NotReady(why),
            other => PatchError::Guest(other.into()),
        }
    }
}

impl From<TasksError> for StepError {
    fn from(error: TasksError) -> Self {
        match error {
            TasksError::Busy(_) | TasksError::Miscounted { .. } => {
                StepError::Busy(error.to_string())
            }
            other => StepError::Failed(PatchError::Guest(other.into())),
        }
    }
}

impl From<PatchError> for StepError {
    fn from(error: PatchError) -> Self {
        StepError::Failed(error)
    }
}

/// Conversions that go by way of another error.
macro_rules! by_way_of {
    ($($to:ty: $($from:ty)|+ => $way:ty;)+) => {$($(
        impl From<$from> for $to {
            fn from(error: $from) -> Self {
                <$to>::from(<$way>::from(error))
            }
        }
    )+)+};
}

by_way_of! {
    PatchError: SymbolError | BtfError | ReadError | ModulesError => GuestError;
    PatchError: ListingError | UnwinderError | FtraceOpsError => GuestError;
    PatchError: ModuleError | TargetError => LinkError;
    StepError: ReadError | MachineError | EncodeError => PatchError;
    StepError: PatchMemoryError | FtraceOpsError => PatchError;
}
