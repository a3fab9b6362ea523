//! The transition of a guest's tasks from one patch state to the other, look by look.
//!
//! Linux's per-task consistency model (`kernel/livepatch/transition.c`), run from outside. Here is what is kept of
//! a transition from look to look; what one look comes to, [`context`](crate::transition::step) knows.

pub mod pending_tasks;
pub mod preconditions;
pub mod progress;
pub mod signal;
pub mod stack_checks;
pub mod step;
pub mod writes;

use std::time::{Duration, Instant};

use introspect::Task;

use crate::livepatch::direction::Direction;
use crate::report::pause::PauseReport;
use crate::report::transition::TransitionSummary;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::progress::{Outcome, Progress};

/// The time between the first two looks.
const FIRST_WAIT: Duration = Duration::from_millis(1);
/// The longest time between two looks.
const LONGEST_WAIT: Duration = Duration::from_millis(250);
/// The guest runs for at least this many times as long as it was paused before, from so many looks on; one time before the second look,
/// and so on, as most of those who are in the way go their way at once.
const PAUSE_SHARE: u32 = 5;

/// A transition that runs.
#[derive(Debug)]
pub struct Transition {
    /// Which way.
    pub direction: Direction,
    /// What it cost so far.
    pub pauses: PauseReport,
    /// Who has not moved, in a guest that does not know it itself.
    pub pending: Option<PendingTasks>,
    began: Instant,
    progress: Progress,
    /// How many looks there were since it began or turned round, up to [`PAUSE_SHARE`].
    views: u32,
    /// The time from the last look to the next, if the pauses are short.
    wait: Duration,
    /// When the next look is due.
    due: Instant,
    /// From when on those who keep the old state are sent the fake signal.
    signal: Option<Instant>,
}

impl Transition {
    /// One that begins now.
    #[must_use]
    pub fn new(direction: Direction) -> Transition {
        let now = Instant::now();
        Transition {
            direction,
            pauses: PauseReport::default(),
            pending: None,
            began: now,
            progress: Progress::default(),
            views: 0,
            wait: FIRST_WAIT,
            due: now,
            signal: None,
        }
    }

    /// From `after` the start on, those who keep the old state are sent the fake signal, look by look.
    pub fn signal_after(&mut self, after: Duration) {
        let asked = self.began.checked_add(after);
        self.signal = match (self.signal, asked) {
            (Some(earlier), Some(asked)) => Some(earlier.min(asked)),
            (known, asked) => known.or(asked),
        };
        self.hurry();
        // The admin's delay is met, and what it changes is seen soon.
        if let Some(from) = self.signal {
            self.due = self.due.min(from);
        }
    }

    /// Whether the fake signal is sent now.
    #[must_use]
    pub fn signals(&self) -> bool {
        self.signal.is_some_and(|from| from <= Instant::now())
    }

    /// Enters what a step found, once it is carried out.
    pub fn record<'t>(&mut self, tasks: impl Iterator<Item = &'t Task>, outcomes: Vec<Outcome>) {
        self.progress
            .record(self.began.elapsed(), tasks.zip(outcomes));
    }

    /// Turns round: everybody may have to move again.
    pub fn reverse(&mut self, direction: Direction) {
        self.direction = direction;
        self.progress.restart();
        self.hurry();
    }

    fn hurry(&mut self) {
        self.views = 0;
        self.wait = FIRST_WAIT;
    }

    /// Notes a look that paused the guest for `pause`, and when the next is due.
    pub fn observed(&mut self, pause: Duration) {
        self.views = (self.views + 1).min(PAUSE_SHARE);
        let wait = self.wait.max(pause * self.views);
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        self.wait_for(wait);
    }

    /// Notes a look that failed: the next may be as soon as one ever has to be waited for.
    pub fn failed(&mut self) {
        self.wait_for(LONGEST_WAIT);
    }

    fn wait_for(&mut self, wait: Duration) {
        let now = Instant::now();
        let signal = self.signal.filter(|from| *from > now);
        self.due = signal.map_or(now + wait, |from| from.min(now + wait));
    }

    /// When to look again.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// As far as it has come.
    #[must_use]
    pub fn so_far(&self) -> TransitionSummary {
        TransitionSummary {
            tasks: self.progress.reports(),
            ms: self.ms(),
            pauses: self.pauses.clone(),
        }
    }

    /// Ends it.
    #[must_use]
    pub fn end(self) -> TransitionSummary {
        TransitionSummary {
            ms: self.ms(),
            tasks: self.progress.into_reports(),
            pauses: self.pauses,
        }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
