//! A bounded log of the code whose unwind data changed.
//!
//! This module knows ranges of code and the order of their changes; it must not know what the
//! changes were.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::addr::GvaRange;

/// How many changes are kept. A reader that missed more must assume that any code changed.
const MAX_CHANGES: usize = 64;

/// The last changes of the known code of one guest.
#[derive(Clone, Debug)]
pub(crate) struct ChangeLog {
    /// Differs after every change, and between guests.
    generation: u64,
    /// The range of each of the last changes, the newest last; `None` if the change may be
    /// anywhere.
    last: VecDeque<Option<GvaRange>>,
}

impl ChangeLog {
    /// An empty log.
    pub(crate) fn new() -> ChangeLog {
        static GUESTS: AtomicU64 = AtomicU64::new(1);
        ChangeLog {
            // No guest has enough changes to reach the next guest's numbers.
            generation: GUESTS.fetch_add(1, Ordering::Relaxed) << 40,
            last: VecDeque::new(),
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Records a change of `code`.
    pub(crate) fn record(&mut self, code: GvaRange) {
        self.push(Some(code));
    }

    /// Records a change that may be anywhere.
    pub(crate) fn record_anywhere(&mut self) {
        self.push(None);
    }

    fn push(&mut self, code: Option<GvaRange>) {
        self.generation = self.generation.wrapping_add(1);
        if self.last.len() >= MAX_CHANGES {
            self.last.pop_front();
        }
        self.last.push_back(code);
    }

    /// The code that changed since `generation`; `None` if that may be any code.
    pub(crate) fn since(&self, generation: u64) -> Option<Vec<GvaRange>> {
        let missed = usize::try_from(self.generation.wrapping_sub(generation)).ok()?;
        let first = self.last.len().checked_sub(missed)?;
        self.last.range(first..).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gva;

    fn range(n: u64) -> GvaRange {
        GvaRange::new(Gva(n), Gva(n + 1))
    }

    #[test]
    fn exactly_the_missed_changes_are_returned() {
        let mut changes = ChangeLog::new();
        let start = changes.generation();
        assert_eq!(changes.since(start), Some(vec![]));
        changes.record(range(1));
        let middle = changes.generation();
        changes.record(range(2));
        assert_eq!(changes.since(start), Some(vec![range(1), range(2)]));
        assert_eq!(changes.since(middle), Some(vec![range(2)]));
        changes.record_anywhere();
        assert_eq!(changes.since(middle), None);
        assert_eq!(changes.since(changes.generation()), Some(vec![]));
    }

    #[test]
    fn after_too_many_changes_or_for_another_guest_any_code_may_have_changed() {
        let mut changes = ChangeLog::new();
        let start = changes.generation();
        for n in 0..MAX_CHANGES as u64 {
            changes.record(range(n));
        }
        assert_eq!(changes.since(start).map(|all| all.len()), Some(MAX_CHANGES));
        changes.record(range(0));
        assert_eq!(changes.since(start), None);
        assert_eq!(changes.since(changes.generation() + 1), None);
        for other in [0, ChangeLog::new().generation()] {
            assert_eq!(changes.since(other), None);
        }
    }
}
