//! What pauses cost, as plain data: their number, their lengths, and what was done in them.

use serde::{Deserialize, Serialize};

/// One pause of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseLength {
    /// How long it was, in microseconds, from the first vCPU stopped to the last one resumed.
    pub us: u64,
    /// Tasks that were looked at in it.
    pub tasks: u64,
    /// Stacks that were walked in it: of tasks that had run since they were last walked.
    pub walked: u64,
}

/// The upper bounds of [`PauseReport::histogram`], in microseconds; what is longer goes to one bucket more.
pub const PAUSE_BOUNDS_US: [u64; 12] = [
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000,
];

/// The pauses a patch has cost so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// How many times all vCPUs were stopped.
    pub count: u64,
    /// Sum, in microseconds, from the first vCPU stopped to the last one resumed.
    pub total_us: u64,
    /// The longest one, in microseconds.
    pub longest_us: u64,
    /// How many were at most as long as each of [`PAUSE_BOUNDS_US`] and longer than the bound before it.
    pub histogram: [u64; PAUSE_BOUNDS_US.len() + 1],
    /// The last of them, oldest first.
    pub recent: Vec<PauseLength>,
}

/// Of so many pauses a report tells each by itself.
const RECENT: usize = 32;

impl PauseReport {
    /// Adds one pause.
    pub fn add(&mut self, pause: PauseLength) {
        let mut one = PauseReport {
            count: 1,
            total_us: pause.us,
            longest_us: pause.us,
            recent: vec![pause],
            ..PauseReport::default()
        };
        let bucket = PAUSE_BOUNDS_US.partition_point(|bound| *bound < pause.us);
        if let Some(count) = one.histogram.get_mut(bucket) {
            *count = 1;
        }
        self.merge(&one);
    }

    /// Adds the pauses of `other`, which came later.
    pub fn merge(&mut self, other: &PauseReport) {
        self.count = self.count.saturating_add(other.count);
        self.total_us = self.total_us.saturating_add(other.total_us);
        self.longest_us = self.longest_us.max(other.longest_us);
        for (count, more) in self.histogram.iter_mut().zip(other.histogram) {
            *count = count.saturating_add(more);
        }
        self.recent.extend_from_slice(&other.recent);
        let surplus = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..surplus);
    }
}
