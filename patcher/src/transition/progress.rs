//! The progress of each task in one transition: how and when it switched, or what blocks it.
//!
//! The progress is updated with the outcomes of each step that was carried out. This module knows
//! no guest memory.

use std::collections::HashMap;
use std::time::Duration;

use introspect::{Gva, Task, TaskKind};

use crate::report::task::{SwitchedBy, TaskReport};

/// How many exited tasks are remembered: beyond that the oldest are dropped, so that a guest that
/// forks without end cannot fill the host's memory.
const MAX_EXITED: usize = 1024;

/// What one step found of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The task has switched: how, if this step switched it or knows it.
    Switched(Option<SwitchedBy>),
    /// The task has not switched. Boxed: among thousands of outcomes few are this one.
    Blocked(Box<Blocked>),
}

/// What blocks a task, and what the step did about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    /// The frame that keeps it from switching, or why its stack is unreliable.
    pub blocker: String,
    /// The step sent it the fake signal, or wakes it.
    pub signalled: bool,
}

/// Identifies a task: by its `task_struct`, and by its pid, as the memory of an exited task's
/// `task_struct` is used again.
type TaskKey = (Gva, i32);

#[derive(Clone, Debug)]
struct TaskProgress {
    report: TaskReport,
    /// The number of the last step that found the task.
    last_step: u64,
}

impl TaskProgress {
    fn new(task: &Task) -> TaskProgress {
        TaskProgress {
            report: TaskReport {
                pid: task.pid,
                comm: String::new(),
                kind: task.kind,
                state: task.state_letter(),
                switched_by: None,
                blocker: None,
                since_ms: None,
                signals: 0,
                after_ms: None,
            },
            last_step: 0,
        }
    }

    fn has_exited(&self, step: u64) -> bool {
        self.last_step != step
    }
}

/// The progress of all tasks.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    tasks: Vec<TaskProgress>,
    /// The position in `tasks` of each task.
    index: HashMap<TaskKey, usize>,
    /// The number of steps so far.
    steps: u64,
}

impl Progress {
    /// Records one step, taken `after` the start of the transition: its outcome for every task of
    /// the guest.
    pub fn record<'t>(
        &mut self,
        after: Duration,
        outcomes: impl IntoIterator<Item = (&'t Task, Outcome)>,
    ) {
        self.steps += 1;
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        for (task, outcome) in outcomes {
            self.record_task(after_ms, task, outcome);
        }
        self.mark_exited(after_ms);
        self.drop_exited();
    }

    fn record_task(&mut self, after_ms: u64, task: &Task, outcome: Outcome) {
        let key = (task.addr, task.pid);
        let known = self.index.get(&key).copied();
        let at = known.unwrap_or(self.tasks.len());
        if known.is_none() {
            self.index.insert(key, at);
            self.tasks.push(TaskProgress::new(task));
        }
        let Some(TaskProgress { report, last_step }) = self.tasks.get_mut(at) else {
            return;
        };
        *last_step = self.steps;
        report.comm.clone_from(&task.comm);
        report.kind = task.kind;
        report.state = task.state_letter();
        match outcome {
            Outcome::Blocked(blocked) => {
                let Blocked { blocker, signalled } = *blocked;
                if report.blocker.as_ref() != Some(&blocker) {
                    report.since_ms = Some(after_ms);
                    report.blocker = Some(blocker);
                }
                report.signals = report.signals.saturating_add(signalled.into());
                report.switched_by = None;
                report.after_ms = None;
            }
            Outcome::Switched(by) => {
                report.blocker = None;
                report.since_ms = None;
                if report.switched_by.is_none() {
                    let by_the_guest = match task.kind {
                        _ if known.is_none() => SwitchedBy::Forked,
                        TaskKind::Idle => SwitchedBy::Idle,
                        _ => SwitchedBy::KernelExit,
                    };
                    report.switched_by = Some(by.unwrap_or(by_the_guest));
                    report.after_ms = Some(after_ms);
                }
            }
        }
    }

    /// Marks the tasks that the last step no longer found.
    fn mark_exited(&mut self, after_ms: u64) {
        for task in &mut self.tasks {
            if task.has_exited(self.steps) && task.report.switched_by.is_none() {
                task.report.switched_by = Some(SwitchedBy::Exited);
                task.report.after_ms = Some(after_ms);
                task.report.blocker = None;
                task.report.since_ms = None;
            }
        }
    }

    /// Drops the oldest exited tasks beyond [`MAX_EXITED`].
    fn drop_exited(&mut self) {
        let steps = self.steps;
        let exited = self.tasks.iter().filter(|task| task.has_exited(steps));
        let mut surplus = exited.count().saturating_sub(MAX_EXITED);
        if surplus == 0 {
            return;
        }
        // The positions change: the index is built from scratch.
        let keys: HashMap<usize, TaskKey> = self.index.drain().map(|(key, at)| (at, key)).collect();
        let tasks = std::mem::take(&mut self.tasks);
        for (at, task) in tasks.into_iter().enumerate() {
            if task.has_exited(steps) && surplus > 0 {
                surplus -= 1;
                continue;
            }
            if let Some(key) = keys.get(&at) {
                self.index.insert(*key, self.tasks.len());
            }
            self.tasks.push(task);
        }
    }

    /// Forgets all progress, as the transition is reversed.
    pub fn restart(&mut self) {
        *self = Progress::default();
    }

    /// The report of every task; those that have not switched come first.
    #[must_use]
    pub fn reports(&self) -> Vec<TaskReport> {
        in_order(self.tasks.iter().map(|task| task.report.clone()))
    }

    /// Like [`reports`](Self::reports), without a copy.
    #[must_use]
    pub fn into_reports(self) -> Vec<TaskReport> {
        in_order(self.tasks.into_iter().map(|task| task.report))
    }
}

fn in_order(reports: impl Iterator<Item = TaskReport>) -> Vec<TaskReport> {
    let (mut pending, mut switched): (Vec<_>, Vec<_>) =
        reports.partition(|report| report.switched_by.is_none());
    pending.append(&mut switched);
    pending
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(addr: u64, pid: i32, kind: TaskKind) -> Task {
        Task {
            addr: Gva(addr),
            ..crate::machine::mock::task(pid, kind)
        }
    }

    fn blocked(blocker: &str) -> Outcome {
        Outcome::Blocked(Box::new(Blocked {
            blocker: blocker.into(),
            signalled: false,
        }))
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn every_way_to_switch_is_reported() {
        let [a, b, idle] = [
            task(1, 10, TaskKind::User),
            task(2, 11, TaskKind::User),
            task(3, 0, TaskKind::Idle),
        ];
        let mut progress = Progress::default();
        progress.record(
            ms(0),
            [
                (&a, blocked("in f")),
                (&b, blocked("in f")),
                (&idle, blocked("in f")),
            ],
        );
        assert!(progress.reports().iter().all(|r| r.blocker.is_some()));

        // The task_struct of b is used again for another task.
        let forked = task(2, 12, TaskKind::User);
        let switched = || Outcome::Switched(None);
        progress.record(
            ms(5),
            [(&a, switched()), (&idle, switched()), (&forked, switched())],
        );
        let by_pid = |pid| {
            let reports = progress.reports();
            let report = reports.into_iter().find(|r| r.pid == pid).unwrap();
            (report.switched_by, report.after_ms)
        };
        assert_eq!(by_pid(10), (Some(SwitchedBy::KernelExit), Some(5)));
        assert_eq!(by_pid(11), (Some(SwitchedBy::Exited), Some(5)));
        assert_eq!(by_pid(0), (Some(SwitchedBy::Idle), Some(5)));
        assert_eq!(by_pid(12), (Some(SwitchedBy::Forked), Some(5)));
    }

    #[test]
    fn blocked_tasks_come_first_and_the_first_way_is_kept() {
        let (a, b) = (task(1, 1, TaskKind::User), task(2, 2, TaskKind::Kthread));
        let mut progress = Progress::default();
        let stack = Outcome::Switched(Some(SwitchedBy::Stack));
        progress.record(ms(0), [(&a, stack), (&b, blocked("x"))]);
        progress.record(ms(9), [(&a, Outcome::Switched(None)), (&b, blocked("y"))]);
        let reports = progress.reports();
        assert_eq!(reports[0].blocker.as_deref(), Some("y"));
        assert_eq!(
            (reports[1].switched_by, reports[1].after_ms),
            (Some(SwitchedBy::Stack), Some(0))
        );
    }

    #[test]
    fn the_time_of_a_blocker_and_the_number_of_signals_are_reported() {
        let a = task(1, 1, TaskKind::User);
        let in_frame = |blocker: &str, signalled| {
            Outcome::Blocked(Box::new(Blocked {
                blocker: blocker.into(),
                signalled,
            }))
        };
        let mut progress = Progress::default();
        for (at, blocker, signalled) in [
            (0, "f", false),
            (3, "f", true),
            (7, "g", true),
            (9, "g", true),
        ] {
            progress.record(ms(at), [(&a, in_frame(blocker, signalled))]);
        }
        let report = &progress.reports()[0];
        assert_eq!(report.blocker.as_deref(), Some("g"));
        assert_eq!((report.since_ms, report.signals), (Some(7), 3));
        progress.record(ms(10), [(&a, Outcome::Switched(None))]);
        let report = &progress.reports()[0];
        assert_eq!((report.since_ms, report.signals), (None, 3));
    }

    #[test]
    fn old_exited_tasks_are_dropped() {
        let mut progress = Progress::default();
        let stays = task(1, 1, TaskKind::User);
        for pid in 2..5000 {
            let child = task(2, pid, TaskKind::User);
            progress.record(
                ms(0),
                [(&stays, blocked("x")), (&child, Outcome::Switched(None))],
            );
        }
        let reports = progress.reports();
        assert!(reports.len() <= MAX_EXITED + 2);
        assert_eq!(reports[0].pid, 1);
        assert_eq!(progress.index.len(), progress.tasks.len());
    }
}
