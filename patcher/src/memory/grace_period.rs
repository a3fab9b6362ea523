//! When memory that the guest has read under RCU may be used again.
//!
//! A reader that found a patch's `struct module` before it was taken out of the guest's tables may
//! still read it, as long as a grace period of the guest's RCU has not passed. The guest counts them
//! in `rcu_state.gp_seq` (`kernel/rcu/rcu.h: rcu_seq_snap`): the low bits tell whether one is in
//! progress, the others how many there were. One that is in progress may have begun before; after
//! two, one has both begun and ended since. This module knows numbers only; where the
//! counter is, its callers know.

use crate::memory::Allocation;

/// `kernel/rcu/rcu.h: RCU_SEQ_STATE_MASK`, the same since sequence numbers have a state.
const STATE_MASK: u64 = 3;
/// Whole grace periods after which every reader of before is done.
const PERIODS: u64 = 2;

/// A moment in the guest's life, by its count of grace periods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GracePeriod {
    /// The sequence number from which on no reader of before is left.
    pub until: u64,
}

impl GracePeriod {
    /// The grace period that is to pass when `rcu_state.gp_seq` is `now`.
    #[must_use]
    pub fn after(now: u64) -> GracePeriod {
        let whole = (now & !STATE_MASK).wrapping_add(PERIODS * (STATE_MASK + 1));
        GracePeriod { until: whole }
    }

    /// Whether it has passed when `rcu_state.gp_seq` is `now` (`ULONG_CMP_GE`).
    #[must_use]
    pub fn has_passed(self, now: u64) -> bool {
        now.wrapping_sub(self.until) <= u64::MAX / 2
    }
}

/// Memory that is no longer used and not free yet.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    waiting: Vec<(Allocation, GracePeriod)>,
}

impl Quarantine {
    /// Adds memory that is free once `grace_period` has passed.
    pub fn add(&mut self, allocation: Allocation, grace_period: GracePeriod) {
        self.waiting.push((allocation, grace_period));
    }

    /// Removes and returns what is free when `rcu_state.gp_seq` is `now`.
    pub fn take_free(&mut self, now: u64) -> Vec<Allocation> {
        let is_free =
            |(_, grace_period): &mut (Allocation, GracePeriod)| grace_period.has_passed(now);
        let free = self.waiting.extract_if(.., is_free);
        free.map(|(allocation, _)| allocation).collect()
    }

    /// How many bytes wait, and the sequence number at which the first of them are free; `None` if
    /// nothing waits.
    #[must_use]
    pub fn waiting(&self) -> Option<(u64, u64)> {
        let (_, first) = self.waiting.first()?;
        let lengths = self.waiting.iter().map(|(it, _)| it.range.len());
        Some((lengths.sum(), first.until))
    }
}

#[cfg(test)]
mod tests {
    use introspect::Gva;

    use super::*;

    #[test]
    fn two_whole_periods_must_pass() {
        // Idle: the next two must begin and end.
        let idle = GracePeriod::after(40);
        assert!(!idle.has_passed(40) && !idle.has_passed(45) && !idle.has_passed(47));
        assert!(idle.has_passed(48) && idle.has_passed(1000));
        // In progress: this one may have begun before, so that it counts for nothing by itself.
        let running = GracePeriod::after(41);
        assert!(!running.has_passed(44) && !running.has_passed(45));
        assert!(running.has_passed(48));
    }

    #[test]
    fn the_count_may_wrap_around() {
        let last = GracePeriod::after(u64::MAX - 3);
        assert!(!last.has_passed(u64::MAX - 3));
        assert!(!last.has_passed(1));
        assert!(last.has_passed(4));
    }

    #[test]
    fn memory_is_free_when_its_own_period_has_passed() {
        let mut quarantine = Quarantine::default();
        let made_up = |at| Allocation::made_up(Gva(at), 16);
        quarantine.add(made_up(0x1000), GracePeriod::after(8));
        quarantine.add(made_up(0x2000), GracePeriod::after(16));
        assert_eq!(quarantine.waiting(), Some((32, 16)));
        assert_eq!(quarantine.take_free(15), []);
        assert_eq!(quarantine.take_free(16), [made_up(0x1000)]);
        assert_eq!(quarantine.waiting(), Some((16, 24)));
        assert_eq!(quarantine.take_free(24), [made_up(0x2000)]);
        assert_eq!(quarantine.waiting(), None);
    }
}
