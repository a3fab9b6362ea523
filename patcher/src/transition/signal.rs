//! The fake signal: what is done to each task that keeps its old state, so that it comes by the kernel/user boundary.
//!
//! Follows `kernel/livepatch/transition.c: klp_send_signals`: a user task is told that it has a signal, by TIF_NOTIFY_SIGNAL alone
//! (`include/linux/sched/signal.h: set_notify_signal`), so that nothing is pending anywhere; the system call that it sleeps in
//! restarts, or returns EINTR. A kthread has no boundary and is only woken, in the hope that it sleeps elsewhere next time. This
//! module decides; how a sleeper is woken, [`wake`](crate::call::wake) knows.

use introspect::{Task, TaskKind};

/// `TASK_INTERRUPTIBLE`.
pub const INTERRUPTIBLE: u64 = 0x1;
/// `__TASK_STOPPED | __TASK_TRACED`.
const HELD: u64 = 0x4 | 0x8;

/// What one task gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalAction {
    /// Its TIF_NOTIFY_SIGNAL is set.
    pub flag: bool,
    /// It is woken, if it still sleeps interruptibly when the guest's own code comes to it.
    pub wake: bool,
}

/// What `task` gets.
#[must_use]
pub fn call(task: &Task) -> SignalAction {
    let interruptible = task.state & INTERRUPTIBLE != 0 && !task.on_cpu;
    match task.kind {
        // Pushed round its loop by TIF_NEED_RESCHED and an interrupt.
        TaskKind::Idle => SignalAction::default(),
        TaskKind::Kthread => SignalAction {
            flag: false,
            wake: interruptible,
        },
        // A debugger, or whoever stopped it, holds it: it moves when it is let go. The dead do not move at all.
        _ if task.state & HELD != 0 || task.exit_state != 0 => SignalAction::default(),
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
    fn each_sort_of_task_gets_what_the_kernel_would_give_it() {
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
            let got = call(&Task {
                state,
                ..task(1, kind)
            });
            assert_eq!(got, SignalAction { flag, wake }, "{kind:?} {state:#x}");
        }
        let zombie = Task {
            exit_state: 0x20,
            ..task(1, TaskKind::User)
        };
        assert_eq!(call(&zombie), SignalAction::default());
        let falling_asleep = Task {
            state: 1,
            on_cpu: true,
            ..task(1, TaskKind::User)
        };
        assert!(!call(&falling_asleep).wake);
    }
}
