//! Checks that the guest is not in the middle of a change that a step would corrupt.
//!
//! All of them are made in a pause, before anything is written. [`StepError::Busy`] is not a
//! failure: the guest is resumed, and the step tried again.

use introspect::KernelMemory;
use introspect::{Gva, Kernel};

use crate::error::{StepError, unexpected};
use crate::guest::kernel_info::{KernelInfo, KlpInfo, TextPokeInfo};

/// The patch state of tasks outside a transition (`KLP_TRANSITION_IDLE`, formerly
/// `KLP_UNDEFINED`).
pub const NO_STATE: i32 = -1;

fn busy(what: impl Into<String>) -> StepError {
    StepError::Busy(what.into())
}

/// Checks that no transition of the guest's own is running. `ours` is what outpatch left in
/// `klp_transition_patch`.
///
/// # Errors
/// [`StepError::Busy`] if one is.
pub fn check_no_transition(
    memory: &KernelMemory<'_>,
    klp: &KlpInfo,
    ours: Gva,
) -> Result<(), StepError> {
    if memory.i32(klp.target_state)? != NO_STATE || memory.pointer(klp.transition_patch)? != ours {
        return Err(busy("the guest runs a livepatch transition of its own"));
    }
    check_sched_hook(memory, klp)
}

/// Checks that the guest still sees the transition that outpatch started.
///
/// # Errors
/// [`StepError::Failed`] if something else changed the guest's variables.
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
            "something in the guest changed klp_target_state to {state} and klp_transition_patch \
             to {patch} during outpatch's transition"
        ))));
    }
    check_sched_hook(memory, klp)
}

/// Checks that the scheduler does not switch tasks itself (`klp_sched_try_switch`): with the dummy
/// patch, which has no functions, it would switch sleeping tasks unchecked.
fn check_sched_hook(memory: &KernelMemory<'_>, klp: &KlpInfo) -> Result<(), StepError> {
    match klp.sched_key {
        // The count is the first member of every static key.
        Some(key) if memory.i32(key)? != 0 => Err(busy(
            "the guest's scheduler is switching tasks itself (klp_sched_try_switch_key)",
        )),
        _ => Ok(()),
    }
}

/// Checks that the locks of what a step changes are free: those of livepatching, of kernel text, of
/// ftrace's records, and of the tables of modules.
///
/// # Errors
/// [`StepError::Busy`] if one is held.
pub fn check_locks(memory: &KernelMemory<'_>, info: &KernelInfo) -> Result<(), StepError> {
    for (name, mutex) in &info.mutexes {
        if info.mutex_word.is_held(memory, *mutex)? {
            return Err(busy(format!("{name} is held")));
        }
    }
    Ok(())
}

/// Checks that the kernel is not changing its own text (`arch/x86/kernel/alternative.c`).
///
/// # Errors
/// [`StepError::Busy`] if it is.
pub fn check_text_poke(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    info: &KernelInfo,
) -> Result<(), StepError> {
    let poking = match &info.text_poke {
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
