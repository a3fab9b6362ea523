//! The report of pauses: their number, their lengths, and the work done in them.

use serde::{Deserialize, Serialize};

/// One pause of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseLength {
    /// Its length in microseconds, from the first vCPU stopped to the last one resumed.
    pub us: u64,
    /// How many tasks were read in it.
    pub tasks: u64,
    /// How many stacks were walked in it: those of tasks that had run since their last walk.
    pub walked: u64,
}

/// The upper bounds of the buckets of [`PauseReport::histogram`], in microseconds. One more bucket
/// takes all longer pauses.
pub const PAUSE_BOUNDS_US: [u64; 12] = [
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000,
];

/// The pauses of one transition, one check, or one whole session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// How many times all vCPUs were stopped.
    pub count: u64,
    /// The sum of their lengths in microseconds, each from the first vCPU stopped to the last one
    /// resumed.
    pub total_us: u64,
    /// The length of the longest one in microseconds.
    pub longest_us: u64,
    /// How many pauses fall between each bound of [`PAUSE_BOUNDS_US`] (inclusive) and the bound
    /// before it.
    pub histogram: [u64; PAUSE_BOUNDS_US.len() + 1],
    /// The latest pauses (up to 32), oldest first.
    pub recent: Vec<PauseLength>,
}

/// How many of the latest pauses a report lists one by one.
const MAX_RECENT: usize = 32;

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

    /// Adds the pauses of `other`, which are later ones.
    pub fn merge(&mut self, other: &PauseReport) {
        self.count = self.count.saturating_add(other.count);
        self.total_us = self.total_us.saturating_add(other.total_us);
        self.longest_us = self.longest_us.max(other.longest_us);
        for (count, more) in self.histogram.iter_mut().zip(other.histogram) {
            *count = count.saturating_add(more);
        }
        self.recent.extend_from_slice(&other.recent);
        let surplus = self.recent.len().saturating_sub(MAX_RECENT);
        self.recent.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(us: u64) -> PauseLength {
        PauseLength {
            us,
            tasks: 3,
            walked: 1,
        }
    }

    #[test]
    fn each_pause_is_in_the_bucket_of_the_first_bound_that_holds_it() {
        let mut report = PauseReport::default();
        for us in [0, 50, 51, 1000, 250_000, 250_001, u64::MAX / 2] {
            report.add(pause(us));
        }
        assert_eq!(report.histogram, [2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!((report.count, report.longest_us), (7, u64::MAX / 2));
    }

    #[test]
    fn only_the_latest_pauses_are_listed_one_by_one() {
        let (mut early, mut late) = (PauseReport::default(), PauseReport::default());
        (0..20).for_each(|us| early.add(pause(us)));
        (20..40).for_each(|us| late.add(pause(us)));
        early.merge(&late);
        let listed: Vec<u64> = early.recent.iter().map(|pause| pause.us).collect();
        assert_eq!(listed, (8..40).collect::<Vec<_>>());
        assert_eq!((early.count, early.total_us), (40, (0..40).sum()));
    }
}
