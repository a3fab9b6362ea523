//! A task of the guest, as plain data, and the kernel's constants for a task's state.

pub(crate) mod reader;

use serde::{Deserialize, Serialize};

use crate::addr::Gva;

// Bits of `Task::state` (`include/linux/sched.h`).

/// The task waits, and a signal wakes it. A bit of [`Task::state`].
pub const TASK_INTERRUPTIBLE: u64 = 0x1;
/// The task waits, and no signal wakes it. A bit of [`Task::state`].
pub const TASK_UNINTERRUPTIBLE: u64 = 0x2;
/// The task is stopped by job control. A bit of [`Task::state`].
pub const __TASK_STOPPED: u64 = 0x4;
/// The task is stopped by its tracer. A bit of [`Task::state`].
pub const __TASK_TRACED: u64 = 0x8;
/// The task is a kernel thread that is parked (`kthread_park`). A bit of [`Task::state`].
pub const TASK_PARKED: u64 = 0x40;
/// The wait does not count as load. A bit of [`Task::state`].
pub const TASK_NOLOAD: u64 = 0x400;
/// The task is a kernel thread that waits for work. Two bits of [`Task::state`].
pub const TASK_IDLE: u64 = TASK_UNINTERRUPTIBLE | TASK_NOLOAD;
/// The task waits for a spinlock that sleeps (`PREEMPT_RT`). A bit of [`Task::state`] from 5.15 on;
/// no older kernel uses it.
pub const TASK_RTLOCK_WAIT: u64 = 0x1000;
/// The task is frozen. A bit of [`Task::state`] from 6.1 on; no older kernel uses it.
pub const TASK_FROZEN: u64 = 0x8000;

// Bits of `Task::exit_state` (`include/linux/sched.h`).

/// The task is being removed. A bit of [`Task::exit_state`].
pub const EXIT_DEAD: u32 = 0x10;
/// The task has exited, and its parent has not collected its status yet. A bit of
/// [`Task::exit_state`].
pub const EXIT_ZOMBIE: u32 = 0x20;

/// The kind of a task. A livepatch transition treats each kind differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// A thread of a user process.
    User,
    /// A kernel thread (`PF_KTHREAD`).
    Kthread,
    /// A per-CPU idle task (`swapper/N`).
    Idle,
    /// A thread that has a user process's memory but never returns to user mode (`PF_IO_WORKER`,
    /// `PF_USER_WORKER`).
    Worker,
}

/// The livepatch state of a task (`task_struct.patch_state`), under the kernel's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PatchState {
    /// `KLP_TRANSITION_IDLE`, -1: no transition is running.
    Idle,
    /// `KLP_TRANSITION_UNPATCHED`, 0: the task runs without the patch in transition.
    Unpatched,
    /// `KLP_TRANSITION_PATCHED`, 1: the task runs with the patch in transition.
    Patched,
    /// A value that the kernel never stores: this is no `task_struct`, or the guest is corrupt.
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
    /// The address of its `task_struct`.
    pub addr: Gva,
    /// Thread id (`task_struct.pid`); 0 for idle tasks.
    pub pid: i32,
    /// Process id (`task_struct.tgid`).
    pub tgid: i32,
    /// The name, at most 15 bytes; bytes that are not UTF-8 are replaced.
    pub comm: String,
    /// User thread, kernel thread, idle task or worker.
    pub kind: TaskKind,
    /// `task_struct.__state` (`state` before 5.14), raw.
    pub state: u64,
    /// `task_struct.exit_state`, raw.
    pub exit_state: u32,
    /// `task_struct.flags`, raw.
    pub flags: u32,
    /// `thread_info.flags`, raw.
    pub tif: u64,
    /// `task_struct.on_cpu`: the task runs, or is being switched in or out, on a CPU.
    pub on_cpu: bool,
    /// The CPU whose idle task this is, or that last ran the task; `None` if it cannot be read.
    pub cpu: Option<u32>,
    /// Index of the vCPU that runs the task, and so holds its registers.
    pub vcpu: Option<u32>,
    /// Livepatch state; `None` in a kernel without `CONFIG_LIVEPATCH`.
    pub patch_state: Option<PatchState>,
    /// `thread.sp`: the saved stack pointer, valid while the task is on no CPU.
    pub sp: Gva,
    /// `task_struct.stack`: the lowest address of its kernel stack.
    pub stack: Gva,
}

impl Task {
    /// The letter that `ps` shows for the state (`fs/proc/array.c: get_task_state`): one of
    /// `R S D T t X Z P I`.
    #[must_use]
    pub fn state_letter(&self) -> char {
        if self.exit_state & EXIT_DEAD != 0 {
            return 'X';
        }
        if self.exit_state & EXIT_ZOMBIE != 0 {
            return 'Z';
        }
        match self.state {
            s if s & TASK_IDLE == TASK_IDLE => 'I',
            s if s & TASK_INTERRUPTIBLE != 0 => 'S',
            s if s & TASK_UNINTERRUPTIBLE != 0 => 'D',
            s if s & __TASK_STOPPED != 0 => 'T',
            s if s & __TASK_TRACED != 0 => 't',
            s if s & TASK_PARKED != 0 => 'P',
            // `include/linux/sched.h: __task_state_index` reports both as uninterruptible.
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
