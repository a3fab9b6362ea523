//! What a walked stack is, as plain data.

use std::fmt;

use serde::Serialize;

use crate::addr::{Gva, GvaRange};

/// One frame: an address in code that the task has yet to execute from or return to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Frame {
    /// Instruction pointer (innermost or interrupted frame) or return address.
    pub ip: Gva,
    /// The stack pointer at this frame: where the callers' part of the stack begins.
    pub sp: Gva,
    /// `ip` is an exact position (interrupted code, or the innermost frame of a running vCPU), not a return address:
    /// symbolise and match `ip` itself, not `ip - 1`.
    pub exact: bool,
}

impl Frame {
    /// Whether it is in `code`, as `kernel/livepatch/transition.c: klp_check_stack_func` asks, and stricter: a call can be a function's
    /// last instruction, and then its return address lies behind the function.
    #[must_use]
    pub fn is_in(&self, code: &GvaRange) -> bool {
        code.contains(self.ip) || (!self.exact && code.contains(self.ip.sub(1)))
    }
}

/// Whether a stack can be relied on to show *every* function that the task is in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "reason")]
pub enum Verdict {
    /// Walked to a known end by the rules of `arch_stack_walk_reliable`, and stricter.
    Reliable,
    /// Some frame may be missing or wrong.
    Unreliable(Unreliable),
}

/// Why a stack cannot be relied on. Each names what a reader can look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Unreliable {
    /// ORC has no entry, or says UNDEFINED, at this address.
    #[error("no unwind data at {0}")]
    NoOrc(Gva),
    /// ORC says the stack ends here, but stacks do not end at this address.
    #[error("unwind data ends at {0}, where no stack ends")]
    UnexpectedEnd(Gva),
    /// An address on the stack is not in kernel text.
    #[error("{0} is not kernel text")]
    NotText(Gva),
    /// The code at this address changes what the stack means while it runs (context switch, thunk, trampoline, entry window).
    #[error("inside a busy window at {0}")]
    TransientCode(Gva),
    /// The stack pointer left the stacks this task may be on, or did not rise.
    #[error("stack pointer {0} is not where the next frame can be")]
    BadStackPointer(Gva),
    /// Memory that the walk needs could not be read.
    #[error("cannot read the stack at {0}")]
    Unreadable(Gva),
    /// The unwind entry needs a register that this frame does not have.
    #[error("a register needed at {0} is not known")]
    MissingRegister(Gva),
    /// The return address was replaced by a tracer (function graph, kretprobe/rethook) and not recovered.
    #[error("return address replaced by a tracer at {0}")]
    Traced(Gva),
    /// More frames than the kernel itself would accept.
    #[error("more than {0} frames")]
    TooDeep(usize),
    /// The task runs, or is being switched, and no vCPU's registers are its own.
    #[error("running with no vCPU to read it from")]
    Running,
    /// The vCPU's registers are not the guest kernel's (nested guest, SMM).
    #[error("vCPU is not executing the guest kernel")]
    ForeignVcpu,
}

/// A task's kernel stack, innermost frame first. Empty and reliable: the task is in user mode, or has no stack any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stack {
    /// Frames found, innermost first; complete only when reliable.
    pub frames: Vec<Frame>,
    /// Whether they can be relied on.
    #[serde(flatten)]
    pub verdict: Verdict,
}

impl Stack {
    /// Whether the stack shows every function that the task is in.
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
