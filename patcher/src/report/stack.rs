//! The report of a task's kernel stack, with symbols.

use introspect::{Gva, Task, Verdict};
use serde::Serialize;

/// One frame with its symbol, as `/proc/PID/stack` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedFrame {
    /// The instruction pointer: where the task resumes in this frame.
    pub ip: Gva,
    /// `symbol+0xoffset/0xsize`, followed by ` [module]` or ` [patch]` if the code is not the
    /// kernel's own; the bare address if no symbol covers it.
    pub name: String,
    /// The frame is in the scheduler's own code, which `/proc/PID/stack` leaves out at the top.
    pub sched: bool,
}

/// A task and its kernel stack, innermost frame first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskStack {
    /// The task.
    pub task: Task,
    /// The frames. There are none if the task is in user mode, or no longer has a stack.
    pub frames: Vec<NamedFrame>,
    /// Whether the frames are reliable.
    #[serde(flatten)]
    pub verdict: Verdict,
}
