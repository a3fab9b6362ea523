//! What an operator is told of a patch and its transition, as plain data.
//!
//! Names are those of the kernel's `/sys/kernel/livepatch/<patch>/` where the kernel has one.

use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;
use serde::{Deserialize, Serialize};

/// Where a patch is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PatchPhase {
    /// Tasks are moving from the old code to the new.
    Applying,
    /// Every task runs the new code.
    Applied,
    /// Tasks are moving from the new code back to the old.
    Reverting,
    /// Every task runs the old code; the patch is out of the guest.
    Reverted,
}

/// How tasks are to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Each when it can be, as the kernel's own livepatching does it; those who can be at once are.
    #[default]
    PerTask,
    /// All in one pause, or not at all.
    StopMachine,
    /// All in one pause if one of a few can do it, else each when it can be.
    Auto,
}

/// One function that a patch replaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionReport {
    /// `vmlinux` or the module's name.
    pub object: String,
    /// Name of the function in the guest.
    pub name: String,
    /// Which of several symbols of the same name, in address order, from 1; 0: the only one.
    pub sympos: u64,
    /// Whether calls reach the new code (for at least the tasks that switched).
    pub patched: bool,
}

/// All that is to be said of one patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchStatus {
    /// The patch module's name.
    pub name: String,
    /// Where it is in its life.
    pub phase: PatchPhase,
    /// The kernel's attribute: the patch is (being) enabled.
    pub enabled: bool,
    /// The kernel's attribute: a transition is under way.
    pub transition: bool,
    /// The kernel's attribute: a transition of it was forced, and so its code stays in the guest for ever.
    pub force: bool,
    /// The kernel's attribute: it takes the place of all earlier patches.
    pub replace: bool,
    /// The kernel's attribute: tasks that keep the old state are sent the fake signal.
    pub signal: bool,
    /// The functions that it replaces.
    pub functions: Vec<FunctionReport>,
    /// The tasks of the running or of the last transition, those not done first.
    pub tasks: Vec<TaskReport>,
    /// Milliseconds that the running or the last transition has taken.
    pub transition_ms: u64,
    /// What it cost in pauses (the running or the last transition).
    pub pauses: PauseReport,
}
