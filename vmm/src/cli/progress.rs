//! Watches a transition to its end, and shows the tasks that block it, and on request each task as
//! it switches.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::time::{Duration, Instant};

use patcher::{PatchPhase, PatchStatus, TaskReport};
use vmm::api::types::{Vm, VmState};
use vmm::client::{Client, patch_resource};

use crate::cli::error::CommandError;
use crate::cli::output::{MAX_LINES, Output, Tone};
use crate::cli::summary::{pending, task_heading, task_line};

/// The first and the longest wait between two requests; the end of the transition cuts each short.
const WAITS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// Tasks that still block after this time are shown with their frame.
const SHOW_BLOCKERS_AFTER: Duration = Duration::from_secs(1);

/// How a watched transition ended.
#[derive(Debug)]
pub enum Outcome {
    /// In the phase that was wanted.
    Completed(PatchStatus),
    /// In the other phase: another client reversed the transition meanwhile.
    Reversed(PatchStatus),
    /// Not yet: it still runs.
    TimedOut(PatchStatus),
}

/// What to watch, and for how long.
#[derive(Debug)]
pub struct Watch<'a> {
    /// The VMM.
    pub client: &'a Client,
    /// The phase in which the transition is to end.
    pub target: PatchPhase,
    /// How long to watch; `None`: to the end.
    pub timeout: Option<Duration>,
    /// Whether to show every task, not only some of those that block the transition for long.
    pub verbose: bool,
}

impl Watch<'_> {
    /// Watches the transition of `first` to its end, and shows its progress on `output`, if given.
    ///
    /// # Errors
    /// When the VMM does not answer, or the output cannot be written.
    pub fn run(
        &self,
        first: PatchStatus,
        mut output: Option<&mut Output<'_>>,
    ) -> Result<Outcome, CommandError> {
        let started = Instant::now();
        let mut shown = Shown {
            verbose: self.verbose,
            ..Shown::default()
        };
        let mut wait = WAITS.0;
        let mut status = first;
        loop {
            if let Some(output) = output.as_deref_mut() {
                let blocked = status.transition && started.elapsed() >= SHOW_BLOCKERS_AFTER;
                if blocked && !shown.pause {
                    shown.pause = self.show_pause(output)?;
                }
                shown.show(&status, blocked, output)?;
            }
            if !status.transition {
                return Ok(if status.phase == self.target {
                    Outcome::Completed(status)
                } else {
                    Outcome::Reversed(status)
                });
            }
            let left = self.timeout.map(|t| t.saturating_sub(started.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Outcome::TimedOut(status));
            }
            let next = left.map_or(wait, |left| left.min(wait));
            wait = (wait * 2).min(WAITS.1);
            let patch = patch_resource(&status.name);
            status = self
                .client
                .get(&format!("{patch}?wait_ms={}", next.as_millis()))?;
        }
    }

    /// Says so if the guest does not run: then it is not the tasks that block. Returns whether it
    /// does not.
    fn show_pause(&self, output: &mut Output<'_>) -> Result<bool, CommandError> {
        let vm: Vm = self.client.get("/vm")?;
        let line = match vm.state {
            VmState::Running => return Ok(false),
            VmState::Paused => {
                "the guest is paused: the transition continues when it runs (outpatch resume)"
            }
            VmState::Panicked => "the guest's kernel has panicked: the transition never completes",
        };
        output.line(Tone::Busy, line)?;
        Ok(true)
    }
}

/// What was shown already.
#[derive(Debug, Default)]
struct Shown {
    verbose: bool,
    /// The guest is paused.
    pause: bool,
    heading: bool,
    /// Lines on tasks that block the transition; without `verbose` they are [`MAX_LINES`] at most.
    lines: usize,
    /// Lines were left out, and that was said.
    cut: bool,
    /// Tasks that have switched; idle tasks share pid 0 and differ by name.
    switched: HashSet<(i32, String)>,
    /// The blocker that each task was last shown with.
    blocked: BTreeMap<(i32, String), String>,
}

impl Shown {
    fn show(
        &mut self,
        status: &PatchStatus,
        blockers: bool,
        output: &mut Output<'_>,
    ) -> io::Result<()> {
        if self.verbose {
            self.show_switched(&status.tasks, output)?;
        }
        if blockers && !self.cut {
            self.show_pending(&status.tasks, output)?;
        }
        Ok(())
    }

    /// Shows the tasks that have switched since the last call, in the order in which they did.
    fn show_switched(&mut self, tasks: &[TaskReport], output: &mut Output<'_>) -> io::Result<()> {
        let mut switched: Vec<_> = tasks.iter().filter(|t| t.switched_by.is_some()).collect();
        switched.sort_by_key(|task| task.after_ms);
        for task in switched {
            if self.switched.insert((task.pid, task.comm.clone())) {
                self.line(Tone::Plain, task, output)?;
            }
        }
        Ok(())
    }

    /// Shows the tasks that have not switched, each again only when its blocker changes.
    fn show_pending(&mut self, tasks: &[TaskReport], output: &mut Output<'_>) -> io::Result<()> {
        let mut left_out = 0;
        for task in pending(tasks) {
            let key = (task.pid, task.comm.clone());
            let blocker = task.blocker.clone().unwrap_or_default();
            if self.blocked.get(&key) == Some(&blocker) {
                continue;
            }
            if self.lines == MAX_LINES && !self.verbose {
                left_out += 1;
                continue;
            }
            self.lines += 1;
            self.line(Tone::Busy, task, output)?;
            self.blocked.insert(key, blocker);
        }
        if left_out > 0 {
            self.cut = true;
            output.more(left_out)?;
        }
        Ok(())
    }

    fn line(&mut self, tone: Tone, task: &TaskReport, output: &mut Output<'_>) -> io::Result<()> {
        if !self.heading {
            self.heading = true;
            output.line(Tone::Strong, &task_heading())?;
        }
        output.line(tone, &task_line(task))
    }
}
