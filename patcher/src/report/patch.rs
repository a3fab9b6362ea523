//! What an operator is told of a patch and its transition, as plain data.
//!
//! Names are those of the kernel's `/sys/kernel/livepatch/<patch>/` where the kernel has one.

use introspect::TaskKind;
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

/// How a task came to its present patch state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchedBy {
    /// It crossed the kernel/user boundary, and the guest's own entry code flipped it.
    KernelExit,
    /// A reliable stack showed no affected function, and it was flipped from outside in a pause.
    Stack,
    /// It was on a vCPU in user mode in a pause, and was flipped from outside.
    UserMode,
    /// An idle task that went round the guest's own idle loop.
    Idle,
    /// It was born during the transition in the new state.
    Forked,
    /// It had not moved yet when the transition turned round, and so has nothing to move back from.
    NotSwitched,
    /// It exited during the transition.
    Exited,
    /// The admin forced it, without a look at its stack.
    Forced,
}

/// One task's part in a transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Thread id; 0 for idle tasks.
    pub pid: i32,
    /// Name.
    pub comm: String,
    /// What sort of task.
    pub kind: TaskKind,
    /// The letter that `ps` shows for what it does: `R S D T t X Z P I`.
    pub state: char,
    /// How it got to the target state; `None`: it is not there yet.
    pub switched_by: Option<SwitchedBy>,
    /// Why it is not there yet: the blocking frame, or why its stack cannot be relied on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocker: Option<String>,
    /// Milliseconds from the start of the transition to the pause that first saw this blocker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<u64>,
    /// How often it was sent the fake signal, or woken.
    pub signals: u32,
    /// Milliseconds from the start of the transition to the pause that saw it done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
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

/// One pause of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseLength {
    /// How long it was, in microseconds, from the first vCPU stopped to the last one resumed.
    pub us: u64,
    /// Tasks that were looked at in it.
    pub tasks: u64,
    /// Stacks that were walked in it: of tasks that had run since they were last walked.
    pub walked: u64,
}

/// The upper bounds of [`PauseReport::histogram`], in microseconds; what is longer goes to one bucket more.
pub const PAUSE_BOUNDS_US: [u64; 12] = [
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000,
];

/// The pauses a patch has cost so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// How many times all vCPUs were stopped.
    pub count: u64,
    /// Sum, in microseconds, from the first vCPU stopped to the last one resumed.
    pub total_us: u64,
    /// The longest one, in microseconds.
    pub longest_us: u64,
    /// How many were at most as long as each of [`PAUSE_BOUNDS_US`] and longer than the bound before it.
    pub histogram: [u64; PAUSE_BOUNDS_US.len() + 1],
    /// The last of them, oldest first.
    pub recent: Vec<PauseLength>,
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

/// A function that a patch would replace, as the guest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundFunction {
    /// `vmlinux` or the module's name.
    pub object: String,
    /// Its name.
    pub name: String,
    /// As in [`FunctionReport::sympos`].
    pub sympos: u64,
    /// Its first byte, as 0x and 16 hexadecimal digits.
    pub address: String,
    /// Its bytes, as kallsyms counts them; its parts elsewhere (`.cold`) not among them.
    pub size: u64,
}

/// A symbol of the guest that a patch uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundSymbol {
    /// Its name.
    pub name: String,
    /// What it comes to; all zeroes for a weak symbol that the guest has not.
    pub address: String,
}

/// Where a part of a patch would lie in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceReport {
    /// Its first byte.
    pub address: String,
    /// Its bytes.
    pub bytes: u64,
    /// Memory that the guest's memory map does not name; else the padding of the kernel's own text.
    pub hidden: bool,
}

/// What applying a patch would come to, had it been applied at that moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The patch module's name.
    pub name: String,
    /// The functions that it would replace.
    pub functions: Vec<FoundFunction>,
    /// What it uses of the guest, by name.
    pub symbols: Vec<FoundSymbol>,
    /// Its code.
    pub code: PieceReport,
    /// Its writable data, if it has any.
    pub data: Option<PieceReport>,
    /// Every task with the way in which it would switch, or what keeps it from that; those first.
    pub tasks: Vec<TaskReport>,
    /// Nobody was in the way: all would have switched in one pause.
    pub at_once: bool,
    /// What the check cost in pauses.
    pub pauses: PauseReport,
}
