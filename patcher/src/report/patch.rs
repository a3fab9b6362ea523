//! The report of one patch, and how it is applied.
//!
//! Fields are named as the files in the kernel's `/sys/kernel/livepatch/<patch>/` where it has one.

use serde::{Deserialize, Serialize};

use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;

/// Where a patch is in its life.
///
/// `Applying` and `Reverting` are transitions: they complete when every task has switched, and
/// each can be reversed into the other before that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PatchPhase {
    /// Tasks are switching from the previous functions to the new ones.
    Applying,
    /// Every task runs the new functions.
    Applied,
    /// Tasks are switching from the new functions back to the previous ones.
    Reverting,
    /// Every task runs the previous functions, and the patch is no longer in use.
    Reverted,
}

/// How the tasks of a transition are to be switched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Each task as soon as it is safe, as the kernel's own livepatching does: most tasks in the
    /// first pause, the others over time.
    #[default]
    PerTask,
    /// All tasks in one pause, or none.
    StopMachine,
    /// All tasks in one pause if one of the first few attempts can do that, else as `PerTask`.
    Auto,
}

/// One function that a patch replaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionReport {
    /// The object that has the function: `vmlinux`, or the name of a module.
    pub object: String,
    /// The function's name in the guest.
    pub name: String,
    /// Which of several symbols of that name it is, in address order, from 1; 0 if it is the only
    /// one.
    pub sympos: u64,
    /// Whether calls reach the new function, at least in tasks that have switched.
    pub patched: bool,
}

/// The state of one patch and of its running or last transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchStatus {
    /// The name of the livepatch module.
    pub name: String,
    /// Where the patch is in its life.
    pub phase: PatchPhase,
    /// As the kernel's attribute of this name: whether the patch is applied or being applied.
    pub enabled: bool,
    /// As the kernel's attribute of this name: whether a transition of the patch is running.
    pub transition: bool,
    /// Whether a transition of the patch was forced; its code is then never freed.
    pub force: bool,
    /// As the kernel's attribute of this name: whether the patch replaces all earlier patches.
    pub replace: bool,
    /// Whether outpatch sends the fake signal to the tasks that have not switched.
    pub signal: bool,
    /// Bytes of the patch that stay in the guest when it is reverted, because the guest may hold
    /// addresses in them.
    pub kept_bytes: u64,
    /// The functions that the patch replaces.
    pub functions: Vec<FunctionReport>,
    /// The tasks of the running or the last transition; those that have not switched come first.
    pub tasks: Vec<TaskReport>,
    /// How long the running or the last transition has taken, in milliseconds.
    pub transition_ms: u64,
    /// The pauses of the running or the last transition.
    pub pauses: PauseReport,
}
