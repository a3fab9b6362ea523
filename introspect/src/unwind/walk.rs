//! One walk, from the innermost frame of a task to the end of its stack, and the verdict on it.
//!
//! This module knows when a stack is reliable; it must not know how tasks, vCPUs or code are found.
//! The rules are those of `arch/x86/kernel/stacktrace.c: arch_stack_walk_reliable` and
//! `kernel/stacktrace.c`, and stricter: a stack must end where stacks end, at the top of a task's
//! stack, and no frame may be in code during which the stack is not what it seems.
//!
//! As in the kernel, a frame whose return address a tracer has replaced is followed by that of the
//! true address, to which the task will return. The tracer's own code, which runs in between, is not
//! on the stack yet.

use crate::unwind::code_map::{CodeMap, RegionId, UnwindAction};
use crate::unwind::ret_addrs::RetAddrs;
use crate::unwind::stack::{Frame, Stack, Unreliable, Verdict};
use crate::unwind::stack_memory::{ReadMemory, WalkMemory};
use crate::unwind::step::{Cursor, Step};

/// This many frames make a stack unreliable for the kernel's own livepatching (`MAX_STACK_ENTRIES`:
/// a full array is refused).
pub(crate) const MAX_FRAMES: usize = 100;

/// What is known of the task before its stack is walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Whether it came through init text that has been freed since (the boot CPU's idle task).
    pub through_init: bool,
    /// Whether a vCPU runs it: only then can it be in the middle of an entry from user mode.
    pub running: bool,
}

/// Walks from `start` to the end of the stack, or to the first frame that makes it unreliable.
pub(crate) fn walk_stack<R: ReadMemory + ?Sized>(
    code: &CodeMap,
    stacks: &mut WalkMemory<'_, R>,
    mut ret_addrs: RetAddrs<'_, R>,
    start: Cursor,
    origin: Origin,
) -> Stack {
    let mut frames = Vec::with_capacity(MAX_FRAMES / 4);
    let walked = walk_frames(code, stacks, &mut ret_addrs, start, origin, &mut frames);
    let verdict = match walked.map(|()| ret_addrs.unused()) {
        Ok(None) => Verdict::Reliable,
        Ok(Some(trampoline)) => Verdict::Unreliable(Unreliable::Traced(trampoline)),
        Err(reason) => Verdict::Unreliable(reason),
    };
    Stack { frames, verdict }
}

fn walk_frames<R: ReadMemory + ?Sized>(
    code: &CodeMap,
    stacks: &mut WalkMemory<'_, R>,
    ret_addrs: &mut RetAddrs<'_, R>,
    start: Cursor,
    origin: Origin,
    frames: &mut Vec<Frame>,
) -> Result<(), Unreliable> {
    let mut at = start;
    let mut checked = None;
    let mut breakpoint = None;
    loop {
        let action = code.action_at(at.ip, at.exact, origin.through_init);
        if let (Err(Unreliable::Traced(trampoline)), Some(retp)) = (&action, at.retp)
            && let Some(ret) = ret_addrs.recover(*trampoline, retp)
        {
            at.ip = ret;
            continue;
        }
        // Neither of these is an address in a function that the task is in.
        if !matches!(action, Err(Unreliable::NotText(_) | Unreliable::Traced(_))) {
            frames.push(Frame {
                ip: at.ip,
                sp: at.sp,
                exact: at.exact,
            });
        }
        if frames.len() >= MAX_FRAMES {
            return Err(Unreliable::TooDeep(MAX_FRAMES));
        }
        let entry = match action? {
            UnwindAction::Orc(entry) => entry,
            UnwindAction::OrcToUser(entry) => {
                breakpoint = Some(at.ip);
                entry
            }
            UnwindAction::TaskEntry if stacks.is_stack_begin(at.sp) => return Ok(()),
            UnwindAction::TaskEntry => return Err(Unreliable::BadStackPointer(at.sp)),
            UnwindAction::UserEntry if origin.running => return Ok(()),
            UnwindAction::UserEntry => return Err(Unreliable::UnexpectedEnd(at.ip)),
        };
        check_region(code, stacks, &at, &mut checked)?;
        stacks.check_sp(at.sp)?;
        let next = match at.step(&entry, stacks)? {
            Step::User { regs_end } if stacks.is_entry_from_user(regs_end) => return Ok(()),
            Step::User { regs_end } => return Err(Unreliable::BadStackPointer(regs_end)),
            Step::Frame(next) => next,
        };
        if let Some(ip) = breakpoint.filter(|_| next.exact) {
            return Err(Unreliable::TransientCode(ip));
        }
        if !stacks.rises(at.sp, next.sp) {
            return Err(Unreliable::BadStackPointer(next.sp));
        }
        at = next;
    }
}

/// Checks that the region at `at` is still the code whose unwind data was copied: a module may have
/// been unloaded since.
fn check_region<R: ReadMemory + ?Sized>(
    code: &CodeMap,
    stacks: &WalkMemory<'_, R>,
    at: &Cursor,
    checked: &mut Option<RegionId>,
) -> Result<(), Unreliable> {
    let Some((id, region)) = code.region(at.code()) else {
        return Ok(());
    };
    if *checked == Some(id) || stacks.has_words(&region.fingerprint) {
        *checked = Some(id);
        return Ok(());
    }
    Err(Unreliable::NoOrc(at.ip))
}

/// A stack of which no frame is known.
#[must_use]
pub(crate) fn unreliable(reason: Unreliable) -> Stack {
    Stack {
        frames: Vec::new(),
        verdict: Verdict::Unreliable(reason),
    }
}

/// A stack without any kernel function.
#[must_use]
pub(crate) fn empty() -> Stack {
    Stack {
        frames: Vec::new(),
        verdict: Verdict::Reliable,
    }
}

#[cfg(test)]
mod tests;
