//! The transition of a guest's tasks from one patch state to the other, look by look.
//!
//! Linux's per-task consistency model (`kernel/livepatch/transition.c`), run from outside. Here is what is kept of
//! a transition from look to look; what one look comes to, [`scene`](crate::transition::step) knows.

pub mod pending_tasks;
pub mod preconditions;
pub mod progress;
pub mod signal;
pub mod stack_checks;
pub mod step;
pub mod writes;

use std::time::{Duration, Instant};

use introspect::Task;

use crate::guest::view::CodeSet;
use crate::livepatch::patch::Patch;
use crate::report::patch::{PatchPhase, PauseReport, TaskReport};
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::progress::{Outcome, Progress};

/// The time between the first two looks.
const FIRST_WAIT: Duration = Duration::from_millis(1);
/// The longest time between two looks.
const LONGEST_WAIT: Duration = Duration::from_millis(250);
/// The guest runs for at least this many times as long as it was paused before, from so many looks on; one time before the second look,
/// and so on, as most of those who are in the way go their way at once.
const PAUSE_SHARE: u32 = 5;

/// Which way tasks move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the new code.
    Apply,
    /// Back to the old code.
    Revert,
}

impl Direction {
    /// The patch state that tasks move to (`KLP_TRANSITION_UNPATCHED`, `_PATCHED`).
    #[must_use]
    pub fn target(self) -> i32 {
        match self {
            Direction::Apply => 1,
            Direction::Revert => 0,
        }
    }

    /// The other way.
    #[must_use]
    pub fn back(self) -> Direction {
        match self {
            Direction::Apply => Direction::Revert,
            Direction::Revert => Direction::Apply,
        }
    }

    /// What a patch that moves this way is doing.
    #[must_use]
    pub fn phase(self) -> PatchPhase {
        match self {
            Direction::Apply => PatchPhase::Applying,
            Direction::Revert => PatchPhase::Reverting,
        }
    }

    pub fn initial(self) -> i32 {
        1 - self.target()
    }

    /// The code that a task must not be in to be moved.
    pub fn watch(self, patch: &Patch) -> CodeSet {
        match self {
            Direction::Apply => patch.old_code(),
            Direction::Revert => patch.new_code(),
        }
    }
}

/// A transition that has ended, or as far as it has come.
#[derive(Clone, Debug, Default)]
pub struct TransitionSummary {
    /// Its tasks.
    pub tasks: Vec<TaskReport>,
    /// How long it took.
    pub ms: u64,
    /// What it cost.
    pub pauses: PauseReport,
}

/// A transition that runs.
#[derive(Debug)]
pub struct Transition {
    /// Which way.
    pub direction: Direction,
    /// What it cost so far.
    pub pauses: PauseReport,
    /// Who has not moved, in a guest that does not know it itself.
    pub unmoved: Option<PendingTasks>,
    began: Instant,
    ledger: Progress,
    /// How many looks there were since it began or turned round, up to [`PAUSE_SHARE`].
    looks: u32,
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
            unmoved: None,
            began: now,
            ledger: Progress::default(),
            looks: 0,
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
    pub fn enter<'t>(&mut self, tasks: impl Iterator<Item = &'t Task>, findings: Vec<Outcome>) {
        self.ledger.enter(self.began.elapsed(), tasks.zip(findings));
    }

    /// Turns round: everybody may have to move again.
    pub fn turn(&mut self, direction: Direction) {
        self.direction = direction;
        self.ledger.restart();
        self.hurry();
    }

    fn hurry(&mut self) {
        self.looks = 0;
        self.wait = FIRST_WAIT;
    }

    /// Notes a look that paused the guest for `pause`, and when the next is due.
    pub fn looked(&mut self, pause: Duration) {
        self.looks = (self.looks + 1).min(PAUSE_SHARE);
        let wait = self.wait.max(pause * self.looks);
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
            tasks: self.ledger.reports(),
            ms: self.ms(),
            pauses: self.pauses.clone(),
        }
    }

    /// Ends it.
    #[must_use]
    pub fn end(self) -> TransitionSummary {
        TransitionSummary {
            ms: self.ms(),
            tasks: self.ledger.into_reports(),
            pauses: self.pauses,
        }
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
