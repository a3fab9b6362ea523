//! The fake signal: what a task that has not switched gets, so that it returns to user mode.
//!
//! This module follows `kernel/livepatch/transition.c: klp_send_signals`. A user task gets
//! TIF_NOTIFY_SIGNAL and nothing else (`include/linux/sched/signal.h: set_notify_signal`), so that
//! no signal is pending anywhere; the system call in which it sleeps restarts, or returns EINTR. A
//! kernel thread has no kernel exit and is only woken, as it may then sleep outside the patched
//! functions.
//!
//! This module only decides. How a sleeping task is woken is known to [`wake`](crate::call::wake).

use introspect::task::TASK_INTERRUPTIBLE;
use introspect::{Task, TaskKind};

/// `__TASK_STOPPED | __TASK_TRACED`.
const STOPPED_OR_TRACED: u64 = 0x4 | 0x8;

/// What one task gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalAction {
    /// Its TIF_NOTIFY_SIGNAL is set.
    pub flag: bool,
    /// It is woken, if it still sleeps interruptibly when the guest's own code wakes it.
    pub wake: bool,
}

/// What `task` gets.
#[must_use]
pub fn action_for(task: &Task) -> SignalAction {
    let interruptible = task.state & TASK_INTERRUPTIBLE != 0 && !task.on_cpu;
    match task.kind {
        // TIF_NEED_RESCHED and an interrupt send it through the idle loop.
        TaskKind::Idle => SignalAction::default(),
        TaskKind::Kthread => SignalAction {
            flag: false,
            wake: interruptible,
        },
        // A stopped or traced task switches when it is resumed; exited tasks are skipped.
        _ if task.state & STOPPED_OR_TRACED != 0 || task.exit_state != 0 => SignalAction::default(),
        TaskKind::User | TaskKind::Worker => SignalAction {
            flag: true,
            wake: interruptible,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::task;

    #[test]
    fn each_kind_of_task_gets_what_the_kernel_would_send_it() {
        let cases = [
            (TaskKind::User, 0x1, (true, true)),
            (TaskKind::User, 0x2001, (true, true)), // interruptible, freezable
            (TaskKind::User, 0x0, (true, false)),
            (TaskKind::User, 0x2, (true, false)),
            (TaskKind::User, 0x4, (false, false)),
            (TaskKind::User, 0x8, (false, false)),
            (TaskKind::Worker, 0x1, (true, true)),
            (TaskKind::Kthread, 0x1, (false, true)),
            (TaskKind::Kthread, 0x402, (false, false)), // idle: not interruptible
            (TaskKind::Idle, 0x0, (false, false)),
        ];
        for (kind, state, (flag, wake)) in cases {
            let action = action_for(&Task {
                state,
                ..task(1, kind)
            });
            assert_eq!(action, SignalAction { flag, wake }, "{kind:?} {state:#x}");
        }
        let zombie = Task {
            exit_state: 0x20,
            ..task(1, TaskKind::User)
        };
        assert_eq!(action_for(&zombie), SignalAction::default());
        let falling_asleep = Task {
            state: 1,
            on_cpu: true,
            ..task(1, TaskKind::User)
        };
        assert!(!action_for(&falling_asleep).wake);
    }
}
