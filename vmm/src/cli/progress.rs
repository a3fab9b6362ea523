//! Watching a transition: each task as it switches, who is in the way, and how it ended.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use patcher::{PatchPhase, PatchStatus, PauseReport, SwitchedBy, TaskReport};

use crate::cli::output::{Output, Tone};
use vmm::client::{AskError, Client};

/// The first and the longest wait between two looks; the end of the transition cuts each short.
const LOOKS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// Tasks that are still in the way after this long are shown with their frame.
const SHOW_BLOCKERS_AFTER: Duration = Duration::from_secs(1);

/// How a watched transition ended.
#[derive(Debug)]
pub enum Outcome {
    /// As wanted.
    Done(PatchStatus),
    /// Somebody turned it round meanwhile, and it is done.
    Turned(PatchStatus),
    /// It goes on.
    TimedOut(PatchStatus),
}

/// How a transition is watched.
#[derive(Debug)]
pub struct Watch<'a> {
    /// The VMM.
    pub connection: &'a Client,
    /// The phase that it shall end in.
    pub want: PatchPhase,
    /// How long to watch.
    pub timeout: Option<Duration>,
}

impl Watch<'_> {
    /// Watches the transition of `first` to its end, showing each step on `screen`, if there is one.
    pub fn run(
        &self,
        first: PatchStatus,
        mut screen: Option<&mut Output<'_>>,
    ) -> Result<Outcome, WatchError> {
        let began = Instant::now();
        let mut shown = Shown::default();
        let mut wait = LOOKS.0;
        let mut status = first;
        loop {
            if let Some(screen) = screen.as_deref_mut() {
                shown.show(&status, began.elapsed() >= SHOW_BLOCKERS_AFTER, screen)?;
            }
            if !status.transition {
                return Ok(if status.phase == self.want {
                    Outcome::Done(status)
                } else {
                    Outcome::Turned(status)
                });
            }
            let left = self.timeout.map(|t| t.saturating_sub(began.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Outcome::TimedOut(status));
            }
            let look = left.map_or(wait, |left| left.min(wait));
            wait = (wait * 2).min(LOOKS.1);
            let resource = format!("/patches/{}?wait_ms={}", status.name, look.as_millis());
            status = self.connection.get(&resource)?;
        }
    }
}

/// Why a transition could not be watched to its end.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The VMM.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The output.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What was shown already.
#[derive(Debug, Default)]
struct Shown {
    /// Tasks that switched; idle tasks share pid 0 and differ by name.
    switched: HashSet<(i32, String)>,
    /// The frame each task was last said to wait on.
    blocked: BTreeMap<(i32, String), String>,
    head: bool,
}

impl Shown {
    fn show(
        &mut self,
        status: &PatchStatus,
        blockers: bool,
        screen: &mut Output<'_>,
    ) -> io::Result<()> {
        let mut done: Vec<&TaskReport> = status
            .tasks
            .iter()
            .filter(|t| t.switched_by.is_some())
            .collect();
        done.sort_by_key(|task| task.after_ms);
        for task in done {
            let key = (task.pid, task.comm.clone());
            if self.switched.insert(key) {
                self.head(screen)?;
                screen.line(Tone::Plain, &task_line(task))?;
            }
        }
        for task in status
            .tasks
            .iter()
            .filter(|t| blockers && t.switched_by.is_none())
        {
            let key = (task.pid, task.comm.clone());
            let why = task.blocker.clone().unwrap_or_default();
            if self.blocked.get(&key) != Some(&why) {
                self.head(screen)?;
                screen.line(Tone::Busy, &task_line(task))?;
                self.blocked.insert(key, why);
            }
        }
        Ok(())
    }

    fn head(&mut self, screen: &mut Output<'_>) -> io::Result<()> {
        if self.head {
            return Ok(());
        }
        self.head = true;
        let head = row("PID", "COMM", "KIND", "WAY", "AFTER");
        screen.line(Tone::Strong, &head)
    }
}

/// The columns of a transition. Their widths are fixed, as lines come one by one.
fn row(pid: &str, comm: &str, kind: &str, way: &str, after: &str) -> String {
    format!("{pid:>7} {comm:<15} {kind:<7} {way:<9} {after}")
        .trim_end()
        .to_owned()
}

/// One task's part in a transition, in the columns of [`row`].
pub fn task_line(task: &TaskReport) -> String {
    let after = match (task.switched_by, task.after_ms) {
        (Some(_), Some(ms)) => format!("{ms} ms"),
        (Some(_), None) => String::new(),
        (None, _) => match &task.blocker {
            Some(blocker) => format!("in the way: {blocker}"),
            None => "not looked at yet".to_owned(),
        },
    };
    row(
        &task.pid.to_string(),
        &task.comm,
        &word(&task.kind),
        &task
            .switched_by
            .map_or("waits".to_owned(), |way| word(&way)),
        &after,
    )
}

/// The heading of [`task_line`]s.
pub fn task_head() -> String {
    row("PID", "COMM", "KIND", "WAY", "AFTER")
}

/// The word that the API has for a value.
pub fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "?".to_owned(),
    }
}

/// `6 by stack, 2 idle`: how the tasks came to their new state.
pub fn ways(tasks: &[TaskReport]) -> String {
    const ORDER: [(SwitchedBy, &str); 8] = [
        (SwitchedBy::KernelExit, "at the kernel/user boundary"),
        (SwitchedBy::Stack, "by their stack"),
        (SwitchedBy::UserMode, "in user mode"),
        (SwitchedBy::Idle, "in the idle loop"),
        (SwitchedBy::Forked, "born new"),
        (SwitchedBy::NotSwitched, "not moved before"),
        (SwitchedBy::Exited, "exited"),
        (SwitchedBy::Forced, "by force"),
    ];
    let counted = ORDER.iter().filter_map(|(way, words)| {
        let count = tasks.iter().filter(|t| t.switched_by == Some(*way)).count();
        (count > 0).then(|| format!("{count} {words}"))
    });
    counted.collect::<Vec<_>>().join(", ")
}

/// `3 times, 1.204 ms in all, 0.512 ms at most`.
pub fn pauses(pauses: &PauseReport) -> String {
    let times = if pauses.count == 1 { "time" } else { "times" };
    format!(
        "{} {times}, {} ms in all, {} ms at most",
        pauses.count,
        milliseconds(pauses.total_us),
        milliseconds(pauses.longest_us)
    )
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

#[cfg(test)]
mod tests {
    use introspect::TaskKind;

    use super::*;

    fn task(pid: i32, way: Option<SwitchedBy>) -> TaskReport {
        TaskReport {
            pid,
            comm: format!("task-{pid}"),
            kind: TaskKind::User,
            state: 'S',
            switched_by: way,
            blocker: way.is_none().then(|| "do_read+0x10/0x40".to_owned()),
            since_ms: way.is_none().then_some(0),
            signals: 0,
            after_ms: way.map(|_| 12),
        }
    }

    #[test]
    fn a_line_tells_the_way_or_the_frame_in_the_way() {
        assert_eq!(
            task_line(&task(7, Some(SwitchedBy::Stack))),
            "      7 task-7          user    stack     12 ms"
        );
        assert_eq!(
            task_line(&task(8, None)),
            "      8 task-8          user    waits     in the way: do_read+0x10/0x40"
        );
    }

    #[test]
    fn sums_say_every_way_that_was_gone() {
        let tasks = [
            task(1, Some(SwitchedBy::Stack)),
            task(2, Some(SwitchedBy::KernelExit)),
            task(3, Some(SwitchedBy::Stack)),
            task(4, None),
        ];
        assert_eq!(
            ways(&tasks),
            "1 at the kernel/user boundary, 2 by their stack"
        );
    }

    #[test]
    fn pauses_are_told_to_the_microsecond() {
        let report = PauseReport {
            count: 3,
            total_us: 1204,
            longest_us: 52,
            ..PauseReport::default()
        };
        assert_eq!(
            pauses(&report),
            "3 times, 1.204 ms in all, 0.052 ms at most"
        );
    }
}
