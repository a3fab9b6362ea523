//! A walked stack as plain data: its frames, and the verdict on whether they are complete.

use std::fmt;

use serde::Serialize;

use crate::addr::{Gva, GvaRange};

/// A stack frame: an address in code that the task has yet to execute or return to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Frame {
    /// The instruction pointer, of the innermost or an interrupted frame, or the return address.
    pub ip: Gva,
    /// The stack pointer at this frame: where the callers' part of the stack starts.
    pub sp: Gva,
    /// Whether `ip` is an exact position (interrupted code, or the innermost frame of a running
    /// vCPU) and not a return address: symbolize and compare `ip` itself, not `ip - 1`.
    pub exact: bool,
}

impl Frame {
    /// Whether the frame is in `code`, as `kernel/livepatch/transition.c: klp_check_stack_func`
    /// checks, and stricter: a call can be the last instruction of a function, and its return
    /// address is then past the function's end.
    #[must_use]
    pub fn is_in(&self, code: &GvaRange) -> bool {
        code.contains(self.ip) || (!self.exact && code.contains(self.ip.sub(1)))
    }
}

/// Whether a stack is certain to show *every* function that the task is in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "reason")]
pub enum Verdict {
    /// The walk reached a known end, by the rules of `arch_stack_walk_reliable` and stricter ones.
    Reliable,
    /// A frame may be missing or wrong, for this reason.
    Unreliable(Unreliable),
}

/// Why a stack is not reliable. Each reason has what an operator can check in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Unreliable {
    /// There is no ORC entry for this address, or the entry is UNDEFINED.
    #[error("no unwind data at {0}")]
    NoOrc(Gva),
    /// The ORC entry for this address is END, but no stack ends there.
    #[error("unwind data says that the stack ends at {0}, where no stack ends")]
    UnexpectedEnd(Gva),
    /// A return address is not in kernel text.
    #[error("{0} is not kernel text")]
    NotText(Gva),
    /// The code at this address changes the stack, or the task that it belongs to, while it runs
    /// (context switch, thunk, trampoline, kernel entry).
    #[error("in code at {0} that changes the stack")]
    TransientCode(Gva),
    /// The stack pointer is outside the stacks that the task may be on, or did not rise from one
    /// frame to the next.
    #[error("stack pointer {0} is not a possible place for the next frame")]
    BadStackPointer(Gva),
    /// The memory of the stack at this address could not be read.
    #[error("cannot read the stack at {0}")]
    Unreadable(Gva),
    /// The ORC entry for this address needs a register whose value is not known in this frame.
    #[error("a register needed to unwind from {0} is not known")]
    MissingRegister(Gva),
    /// A tracer (function graph, kretprobe, fprobe) replaced a return address by that of its
    /// trampoline, given here, and its records of the true ones do not fit the stack.
    #[error(
        "a tracer replaced the return address by {0}, and its record of the true one does not fit \
         the stack; turning the tracer off does not help: the address stays replaced until the \
         function returns, so wait for that, or wake the task, for example by a signal"
    )]
    Traced(Gva),
    /// The stack has at least this many frames, more than the kernel's own livepatching accepts.
    #[error("more than {0} frames")]
    TooDeep(usize),
    /// The task is running or being switched to or from, and no vCPU's registers belong to it.
    #[error("the task is running and no vCPU has its registers")]
    Running,
    /// The vCPU's registers are not those of the guest's kernel: it runs a nested guest or is in
    /// SMM.
    #[error("the vCPU is not executing the guest kernel")]
    ForeignVcpu,
}

/// A task's kernel stack, innermost frame first.
///
/// Empty and reliable if the task is in user mode, or is dead and has no stack any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stack {
    /// The frames that were found, innermost first; complete only if the stack is reliable.
    pub frames: Vec<Frame>,
    /// Whether the frames are complete and correct.
    #[serde(flatten)]
    pub verdict: Verdict,
}

impl Stack {
    /// Whether the stack is certain to show every function that the task is in.
    #[must_use]
    pub fn is_reliable(&self) -> bool {
        self.verdict == Verdict::Reliable
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Reliable => f.write_str("reliable"),
            Verdict::Unreliable(reason) => write!(f, "unreliable: {reason}"),
        }
    }
}
