//! What a task of the guest is, as plain data.

pub(crate) mod reader;

use serde::{Deserialize, Serialize};

use crate::addr::Gva;

/// What sort of task this is; the transition treats each differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// A thread of a user process.
    User,
    /// A kernel thread (`PF_KTHREAD`).
    Kthread,
    /// A per-CPU idle task (`swapper/N`).
    Idle,
    /// A thread that never returns to user mode although it has the process's memory (`PF_IO_WORKER`, `PF_USER_WORKER`).
    Worker,
}

/// The livepatch state of a task (`task_struct.patch_state`), named as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PatchState {
    /// -1: no transition concerns this task.
    Idle,
    /// 0.
    Unpatched,
    /// 1.
    Patched,
    /// Anything else: the guest's memory is not what we think it is.
    Invalid(i32),
}

impl From<i32> for PatchState {
    fn from(raw: i32) -> Self {
        match raw {
            -1 => PatchState::Idle,
            0 => PatchState::Unpatched,
            1 => PatchState::Patched,
            other => PatchState::Invalid(other),
        }
    }
}

/// One task, as read in one pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Its `task_struct`.
    pub addr: Gva,
    /// Thread id (`task_struct.pid`); 0 for idle tasks.
    pub pid: i32,
    /// Process id (`task_struct.tgid`).
    pub tgid: i32,
    /// The name, at most 15 bytes, non-UTF-8 replaced.
    pub comm: String,
    /// What sort of task it is.
    pub kind: TaskKind,
    /// `task_struct.__state` (`state` before 5.14), raw.
    pub state: u64,
    /// `task_struct.exit_state`, raw.
    pub exit_state: u32,
    /// `task_struct.flags`, raw.
    pub flags: u32,
    /// `thread_info.flags`, raw.
    pub tif: u64,
    /// `task_struct.on_cpu`: the scheduler says it runs (or is being switched) on a CPU.
    pub on_cpu: bool,
    /// CPU whose idle task this is, or that last ran it, where known.
    pub cpu: Option<u32>,
    /// Index of the vCPU whose registers are this task's, when one runs it.
    pub vcpu: Option<u32>,
    /// Livepatch state; `None` in a kernel without `CONFIG_LIVEPATCH`.
    pub patch_state: Option<PatchState>,
    /// `thread.sp`: the saved stack pointer, meaningful when not on a CPU.
    pub sp: Gva,
    /// `task_struct.stack`: the lowest address of its kernel stack.
    pub stack: Gva,
}

impl Task {
    /// The letter `ps` shows for the state (`fs/proc/array.c: get_task_state`): `R S D T t X Z P I`.
    #[must_use]
    pub fn state_letter(&self) -> char {
        const EXIT_DEAD: u32 = 0x10;
        const EXIT_ZOMBIE: u32 = 0x20;
        /// From 5.15 and 6.1 on; no older kernel has these bits.
        const TASK_RTLOCK_WAIT: u64 = 0x1000;
        const TASK_FROZEN: u64 = 0x8000;
        if self.exit_state & EXIT_DEAD != 0 {
            return 'X';
        }
        if self.exit_state & EXIT_ZOMBIE != 0 {
            return 'Z';
        }
        match self.state {
            s if s & 0x402 == 0x402 => 'I',
            s if s & 0x1 != 0 => 'S',
            s if s & 0x2 != 0 => 'D',
            s if s & 0x4 != 0 => 'T',
            s if s & 0x8 != 0 => 't',
            s if s & 0x40 != 0 => 'P',
            // In a sleeping spinlock of PREEMPT_RT, or frozen: `include/linux/sched.h: __task_state_index` calls both so.
            s if s & (TASK_RTLOCK_WAIT | TASK_FROZEN) != 0 => 'D',
            _ => 'R',
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_letters_of_proc() {
        let letter = |state, exit_state| {
            let task = Task {
                addr: Gva(1),
                pid: 1,
                tgid: 1,
                comm: String::new(),
                kind: TaskKind::User,
                state,
                exit_state,
                flags: 0,
                tif: 0,
                on_cpu: false,
                cpu: None,
                vcpu: None,
                patch_state: None,
                sp: Gva::NULL,
                stack: Gva::NULL,
            };
            task.state_letter()
        };
        let states = [0, 0x1, 0x2, 0x4, 0x8, 0x40, 0x402, 0x1000, 0x8000];
        let letters: String = states.map(|state| letter(state, 0)).iter().collect();
        assert_eq!(letters, "RSDTtPIDD");
        assert_eq!((letter(0, 0x20), letter(0x80, 0x10)), ('Z', 'X'));
    }
}
