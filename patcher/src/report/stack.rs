//! A task's stack with names, as plain data for an operator.

use introspect::{Gva, Task, Verdict};
use serde::Serialize;

/// One frame with its symbol, as `/proc/PID/stack` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedFrame {
    /// The address.
    pub ip: Gva,
    /// `symbol+0xoffset/0xsize`, with ` [module]` or ` [patch]` where the code is not the kernel's own; the bare address when
    /// no symbol covers it.
    pub name: String,
    /// The frame is one of the scheduler's own, which `/proc/PID/stack` leaves out at the top.
    pub sched: bool,
}

/// A task and its kernel stack, innermost frame first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskStack {
    /// The task.
    pub task: Task,
    /// Its frames; none: it is in user mode, or has no stack any more.
    pub frames: Vec<NamedFrame>,
    /// Whether the frames can be relied on.
    #[serde(flatten)]
    pub verdict: Verdict,
}
