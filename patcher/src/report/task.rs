//! The report of one task's part in a transition.

use introspect::TaskKind;
use serde::{Deserialize, Serialize};

/// How a task switched to the transition's target state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchedBy {
    /// The guest's own code switched it at a kernel exit (`klp_update_patch_state`).
    KernelExit,
    /// Its stack was reliable and showed none of the functions that tasks are to leave, and it was
    /// switched from outside in a pause.
    Stack,
    /// A vCPU ran it in user mode in a pause, and it was switched from outside.
    UserMode,
    /// It is an idle task, which the guest's own idle loop switched.
    Idle,
    /// It was forked during the transition, and has been in the target state since.
    Forked,
    /// It had not switched when the transition was reversed, and so need not switch back.
    NotSwitched,
    /// It exited during the transition.
    Exited,
    /// The operator forced the transition, and the task was switched without a check of its stack.
    Forced,
}

/// One task's part in a transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// The thread id; 0 for idle tasks.
    pub pid: i32,
    /// The task's name (`task_struct.comm`).
    pub comm: String,
    /// Which kind of task it is.
    pub kind: TaskKind,
    /// Its scheduling state, as the letter that `ps` shows: `R S D T t X Z P I`.
    pub state: char,
    /// How it switched; `None` if it has not switched yet.
    pub switched_by: Option<SwitchedBy>,
    /// Why it has not switched yet: the frame that keeps it from switching, or why its stack is
    /// unreliable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocker: Option<String>,
    /// Milliseconds from the start of the transition to the pause that first found this blocker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<u64>,
    /// How often it was sent the fake signal, or woken.
    pub signals: u32,
    /// Milliseconds from the start of the transition to the pause that found it switched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}
