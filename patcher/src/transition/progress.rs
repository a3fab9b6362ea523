//! Who has moved, how and when, and who has not and why: the book of one transition.
//!
//! Fed after each look that was carried out; changes nothing in the guest.

use std::collections::HashMap;
use std::time::Duration;

use introspect::{Gva, Task};

use crate::report::task::{SwitchedBy, TaskReport};

/// Tasks that have exited are forgotten, oldest first, beyond this many: a guest that forks without end must not fill our memory.
const MOST_EXITED: usize = 1024;

/// What one look found of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is where it is to go; the way, when it was we who moved it.
    Switched(Option<SwitchedBy>),
    /// It is not. Boxed: of thousands of findings few are this one.
    Blocked(Box<Blocked>),
}

/// Why a task is not there, and what was done about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    /// Why not.
    pub why: String,
    /// It was sent the fake signal, or woken, in this look.
    pub signalled: bool,
}

/// A task is known by its `task_struct` and its pid: the first is used again when a task is gone.
type Key = (Gva, i32);

#[derive(Clone, Debug)]
struct Row {
    report: TaskReport,
    seen: u64,
}

/// The book.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    rows: Vec<Row>,
    index: HashMap<Key, usize>,
    views: u64,
}

impl Progress {
    /// Enters the findings of one look, made `after` the start of the transition, for each of its tasks.
    pub fn record<'t>(
        &mut self,
        after: Duration,
        outcomes: impl IntoIterator<Item = (&'t Task, Outcome)>,
    ) {
        self.views += 1;
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        for (task, outcome) in outcomes {
            self.record_one(after_ms, task, outcome);
        }
        self.close(after_ms);
    }

    fn record_one(&mut self, after_ms: u64, task: &Task, outcome: Outcome) {
        let views = self.views;
        let key = (task.addr, task.pid);
        let known = self.index.get(&key).copied();
        let at = known.unwrap_or(self.rows.len());
        if known.is_none() {
            self.index.insert(key, at);
            self.rows.push(Row {
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
                seen: 0,
            });
        }
        let Some(row) = self.rows.get_mut(at) else {
            return;
        };
        row.seen = views;
        row.report.comm.clone_from(&task.comm);
        row.report.kind = task.kind;
        row.report.state = task.state_letter();
        match outcome {
            Outcome::Blocked(blocked) => {
                let Blocked { why, signalled } = *blocked;
                if row.report.blocker.as_ref() != Some(&why) {
                    row.report.since_ms = Some(after_ms);
                    row.report.blocker = Some(why);
                }
                row.report.signals = row.report.signals.saturating_add(signalled.into());
                row.report.switched_by = None;
                row.report.after_ms = None;
            }
            Outcome::Switched(way) => {
                row.report.blocker = None;
                row.report.since_ms = None;
                if row.report.switched_by.is_none() {
                    let by_itself = match task.kind {
                        _ if known.is_none() => SwitchedBy::Forked,
                        introspect::TaskKind::Idle => SwitchedBy::Idle,
                        _ => SwitchedBy::KernelExit,
                    };
                    row.report.switched_by = Some(way.unwrap_or(by_itself));
                    row.report.after_ms = Some(after_ms);
                }
            }
        }
    }

    /// Marks those that this look no longer saw.
    fn close(&mut self, after_ms: u64) {
        for row in &mut self.rows {
            if row.seen != self.views && row.report.switched_by.is_none() {
                row.report.switched_by = Some(SwitchedBy::Exited);
                row.report.after_ms = Some(after_ms);
                row.report.blocker = None;
                row.report.since_ms = None;
            }
        }
        let gone = |row: &Row| row.seen != self.views;
        let mut surplus = self
            .rows
            .iter()
            .filter(|row| gone(row))
            .count()
            .saturating_sub(MOST_EXITED);
        if surplus == 0 {
            return;
        }
        // Rows move: build the index anew.
        let keys: HashMap<usize, Key> = self.index.drain().map(|(key, at)| (at, key)).collect();
        let views = self.views;
        let rows = std::mem::take(&mut self.rows);
        for (at, row) in rows.into_iter().enumerate() {
            if row.seen != views && surplus > 0 {
                surplus -= 1;
                continue;
            }
            if let Some(key) = keys.get(&at) {
                self.index.insert(*key, self.rows.len());
            }
            self.rows.push(row);
        }
    }

    /// Everybody has yet to move: the transition turns round.
    pub fn restart(&mut self) {
        *self = Progress::default();
    }

    /// What is to be said, those not there yet first.
    #[must_use]
    pub fn reports(&self) -> Vec<TaskReport> {
        in_order(self.rows.iter().map(|row| row.report.clone()))
    }

    /// The same, for the last time.
    #[must_use]
    pub fn into_reports(self) -> Vec<TaskReport> {
        in_order(self.rows.into_iter().map(|row| row.report))
    }
}

fn in_order(reports: impl Iterator<Item = TaskReport>) -> Vec<TaskReport> {
    let (mut waiting, mut done): (Vec<_>, Vec<_>) =
        reports.partition(|report| report.switched_by.is_none());
    waiting.append(&mut done);
    waiting
}

#[cfg(test)]
mod tests {
    use super::*;
    use introspect::TaskKind;

    fn task(addr: u64, pid: i32, kind: TaskKind) -> Task {
        Task {
            addr: Gva(addr),
            ..crate::machine::mock::task(pid, kind)
        }
    }

    fn blocked(why: &str) -> Outcome {
        Outcome::Blocked(Box::new(Blocked {
            why: why.into(),
            signalled: false,
        }))
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn tells_each_way() {
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

        // The pid of b lives on in another task.
        let born = task(2, 12, TaskKind::User);
        let there = || Outcome::Switched(None);
        progress.record(ms(5), [(&a, there()), (&idle, there()), (&born, there())]);
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
    fn waiting_come_first_and_first_way_stays() {
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
    fn says_since_when_and_how_often_it_was_signalled() {
        let a = task(1, 1, TaskKind::User);
        let in_frame = |why: &str, signalled| {
            Outcome::Blocked(Box::new(Blocked {
                why: why.into(),
                signalled,
            }))
        };
        let mut progress = Progress::default();
        for (at, why, signalled) in [
            (0, "f", false),
            (3, "f", true),
            (7, "g", true),
            (9, "g", true),
        ] {
            progress.record(ms(at), [(&a, in_frame(why, signalled))]);
        }
        let report = &progress.reports()[0];
        assert_eq!(report.blocker.as_deref(), Some("g"));
        assert_eq!((report.since_ms, report.signals), (Some(7), 3));
        progress.record(ms(10), [(&a, Outcome::Switched(None))]);
        let report = &progress.reports()[0];
        assert_eq!((report.since_ms, report.signals), (None, 3));
    }

    #[test]
    fn forgets_exited_beyond_bound() {
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
        assert!(reports.len() <= MOST_EXITED + 2);
        assert_eq!(reports[0].pid, 1);
        assert_eq!(progress.index.len(), progress.rows.len());
    }
}
