//! One task's part in a transition, as plain data.

use introspect::TaskKind;
use serde::{Deserialize, Serialize};

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
