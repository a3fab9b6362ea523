//! Whether the guest is in the middle of something that a change from outside would tear.
//!
//! All of these are asked in a pause, before anything is written. *Busy* is no failure: the guest runs on and is asked again.

use introspect::KernelMemory;
use introspect::{Gva, Kernel};

use crate::error::StepError;
use crate::error::unexpected;
use crate::guest::kernel_info::{KernelInfo, KlpInfo, TextPokeInfo};

/// No state, as the kernel writes it (`KLP_UNDEFINED`, `KLP_TRANSITION_IDLE`).
pub const NO_STATE: i32 = -1;

fn busy(what: impl Into<String>) -> StepError {
    StepError::Busy(what.into())
}

/// No transition of the guest's own is under way; `ours` is what we left in `klp_transition_patch`.
///
/// # Errors
/// [`StepError`].
pub fn check_no_transition(
    memory: &KernelMemory<'_>,
    klp: &KlpInfo,
    ours: Gva,
) -> Result<(), StepError> {
    if memory.i32(klp.target_state)? != NO_STATE || memory.pointer(klp.transition_patch)? != ours {
        return Err(busy("the guest has a livepatch transition of its own"));
    }
    check_sched_hook(memory, klp)
}

/// The transition that we began is still what the guest sees.
///
/// # Errors
/// [`StepError`].
pub fn check_our_transition(
    memory: &KernelMemory<'_>,
    klp: &KlpInfo,
    target: i32,
    dummy: Gva,
) -> Result<(), StepError> {
    let state = memory.i32(klp.target_state)?;
    let patch = memory.pointer(klp.transition_patch)?;
    if state != target || patch != dummy {
        return Err(StepError::Failed(unexpected(format!(
            "something in the guest changed klp_target_state to {state} and klp_transition_patch to {patch} during our transition"
        ))));
    }
    check_sched_hook(memory, klp)
}

/// The scheduler's own switching is off: with our empty patch it would switch sleepers unchecked.
fn check_sched_hook(memory: &KernelMemory<'_>, klp: &KlpInfo) -> Result<(), StepError> {
    match klp.sched_key {
        // The count is the first member of every static key.
        Some(key) if memory.i32(key)? != 0 => Err(busy(
            "the guest's scheduler is switching tasks itself (klp_sched_try_switch_key)",
        )),
        _ => Ok(()),
    }
}

/// Nobody holds the locks of what we change: livepatching, text, ftrace's records.
///
/// # Errors
/// [`StepError`].
pub fn check_locks(memory: &KernelMemory<'_>, info: &KernelInfo) -> Result<(), StepError> {
    for (name, mutex) in &info.mutexes {
        if info.mutex.is_held(memory, *mutex)? {
            return Err(busy(format!("{name} is held")));
        }
    }
    Ok(())
}

/// The kernel is not changing its own text.
///
/// # Errors
/// [`StepError`].
pub fn check_text_poke(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
) -> Result<(), StepError> {
    let poking = match &info.poke {
        TextPokeInfo::Batch { refs } => memory.u32(*refs)? != 0,
        TextPokeInfo::Array { entries, refs } => {
            let mut any = memory.u32(*entries)? != 0;
            for cpu in kernel.percpu.cpus() {
                let Some(count) = kernel.percpu.address(*refs, *cpu) else {
                    continue;
                };
                any |= memory.u32(count)? != 0;
            }
            any
        }
    };
    if poking {
        return Err(busy("the kernel is changing its own text"));
    }
    Ok(())
}
