//! The transition of a guest's tasks from one patch state to the other, as a sequence of steps.
//!
//! This is Linux's per-task consistency model (`kernel/livepatch/transition.c`), run from outside.
//! A [`step`] is planned in a pause of the guest, after [`stack_checks`] has decided which tasks
//! may switch; between two steps the guest runs, and its own code switches tasks. This module holds
//! the state of a transition between steps, and when the next step is due. It must not know how a
//! step is carried out: that is [`patcher`](crate::patcher).

pub mod pending_tasks;
pub mod preconditions;
pub mod progress;
mod registered_code;
pub mod signal;
pub mod stack_checks;
pub mod step;
mod step_checks;
pub mod writes;

use std::time::{Duration, Instant};

use introspect::Task;

use crate::livepatch::direction::Direction;
use crate::report::pause::PauseReport;
use crate::report::transition::TransitionSummary;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::progress::{Outcome, Progress};

/// The time between the first two steps. It doubles with each step, up to [`MAX_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(1);
/// The longest time between two steps after short pauses.
const MAX_WAIT: Duration = Duration::from_millis(250);
/// The guest runs for at least this many times the length of the last pause before the next step:
/// once after the first step, twice after the second, and so on up to this, as most tasks that
/// block switch soon.
const MAX_PAUSE_SHARE: u32 = 5;

/// A running transition.
#[derive(Debug)]
pub struct Transition {
    /// Which way it switches tasks.
    pub direction: Direction,
    /// The pauses that it has taken so far.
    pub pauses: PauseReport,
    /// The tasks that have not switched, in a guest that keeps no patch states itself.
    pub pending: Option<PendingTasks>,
    started: Instant,
    progress: Progress,
    /// The steps since the transition was started or reversed, up to [`MAX_PAUSE_SHARE`].
    steps: u32,
    /// The time from the last step to the next, if pauses are short.
    wait: Duration,
    /// When the next step is due.
    due: Instant,
    /// From when on tasks that have not switched are sent the fake signal.
    signal_from: Option<Instant>,
}

impl Transition {
    /// A transition that starts now.
    #[must_use]
    pub fn new(direction: Direction) -> Transition {
        let now = Instant::now();
        Transition {
            direction,
            pauses: PauseReport::default(),
            pending: None,
            started: now,
            progress: Progress::default(),
            steps: 0,
            wait: FIRST_WAIT,
            due: now,
            signal_from: None,
        }
    }

    /// Sends the fake signal to tasks that have not switched, in each step from `after` the start
    /// on. Of several calls the earliest time counts.
    pub fn signal_after(&mut self, after: Duration) {
        let requested = self.started.checked_add(after);
        self.signal_from = match (self.signal_from, requested) {
            (Some(earlier), Some(requested)) => Some(earlier.min(requested)),
            (known, requested) => known.or(requested),
        };
        self.restart_backoff();
        // The signal is sent when the operator wants it, and its effect is seen soon.
        if let Some(from) = self.signal_from {
            self.due = self.due.min(from);
        }
    }

    /// Whether a step sends the fake signal now.
    #[must_use]
    pub fn is_signalling(&self) -> bool {
        self.signal_from.is_some_and(|from| from <= Instant::now())
    }

    /// Records the outcome of a step for each task, once the step is carried out.
    pub fn record<'t>(&mut self, tasks: impl Iterator<Item = &'t Task>, outcomes: Vec<Outcome>) {
        self.progress
            .record(self.started.elapsed(), tasks.zip(outcomes));
    }

    /// The transition was reversed and goes in `direction` now
    /// (`kernel/livepatch/transition.c: klp_reverse_transition`): no task counts as switched.
    pub fn reverse(&mut self, direction: Direction) {
        self.direction = direction;
        self.progress.restart();
        self.restart_backoff();
    }

    fn restart_backoff(&mut self) {
        self.steps = 0;
        self.wait = FIRST_WAIT;
    }

    /// A step was taken in a pause of this length: determines when the next one is due.
    pub fn step_taken(&mut self, pause: Duration) {
        self.steps = (self.steps + 1).min(MAX_PAUSE_SHARE);
        let wait = self.wait.max(pause * self.steps);
        self.wait = (self.wait * 2).min(MAX_WAIT);
        self.set_due(wait);
    }

    /// A step failed: the next one is due after [`MAX_WAIT`].
    pub fn step_failed(&mut self) {
        self.set_due(MAX_WAIT);
    }

    fn set_due(&mut self, wait: Duration) {
        let now = Instant::now();
        let signal = self.signal_from.filter(|from| *from > now);
        self.due = signal.map_or(now + wait, |from| from.min(now + wait));
    }

    /// When the next step is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The progress so far.
    #[must_use]
    pub fn summary(&self) -> TransitionSummary {
        TransitionSummary {
            tasks: self.progress.reports(),
            ms: self.ms(),
            pauses: self.pauses.clone(),
        }
    }

    /// The summary of a completed transition.
    #[must_use]
    pub fn into_summary(self) -> TransitionSummary {
        TransitionSummary {
            ms: self.ms(),
            tasks: self.progress.into_reports(),
            pauses: self.pauses,
        }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
