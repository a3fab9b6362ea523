//! The numbers of TIF bits, which BTF does not have, read from code that uses them.
//!
//! [`klp`](crate::kernel::klp) reads `TIF_PATCH_PENDING`. The others are here; each must show in
//! two functions to be accepted.

use std::collections::BTreeSet;

use crate::memory::kernel::KernelMemory;
use crate::symbols::Symbols;

/// The most bytes of a function that are read; all of these have fewer.
const MAX_CODE: u64 = 4096;

/// TIF bits, as bit numbers below 64. `None` where the code does not show one beyond doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadFlags {
    /// `TIF_NEED_RESCHED`: the task is to call the scheduler.
    pub need_resched: Option<u32>,
    /// `TIF_NOTIFY_SIGNAL`: the task is to handle work as if it had a signal, the fake signal of a
    /// transition included.
    pub notify_signal: Option<u32>,
}

impl ThreadFlags {
    pub(crate) fn find(symbols: &Symbols, memory: &KernelMemory<'_>) -> ThreadFlags {
        let code = |name| {
            let range = symbols.range(name).ok()?;
            let len = range.len().min(MAX_CODE);
            memory.bytes(range.start, len, 4096).ok()
        };
        let need_resched = code("poll_idle")
            .zip(code("resched_curr"))
            .and_then(|(poll, resched)| need_resched(&poll, &resched));
        let notify_signal = code("task_work_add")
            .zip(code("blkcg_schedule_throttle"))
            .and_then(|(add, throttle)| {
                let klp = code("klp_try_complete_transition").unwrap_or_default();
                notify_signal(&add, &throttle, &klp)
            });
        ThreadFlags {
            need_resched,
            notify_signal,
        }
    }
}

/// Reads `TIF_NOTIFY_SIGNAL`. `kernel/task_work.c: task_work_add` sets one of two bits:
/// TIF_NOTIFY_RESUME, the only one that `block/blk-cgroup.c: blkcg_schedule_throttle` sets, and
/// TIF_NOTIFY_SIGNAL, the only one that a livepatch transition sets in kernels whose transition
/// sends no SIGPENDING.
fn notify_signal(add: &[u8], throttle: &[u8], klp: &[u8]) -> Option<u32> {
    let both = bits_set(add);
    let resume = bits_set(throttle);
    if both.len() != 2 || resume.len() != 1 || !resume.is_subset(&both) {
        return None;
    }
    let signal = both.difference(&resume).copied().next()?;
    let klp = bits_set(klp);
    (klp.is_empty() || klp == BTreeSet::from([signal])).then_some(signal)
}

/// The bits that code tests and sets in memory at a register, by an immediate: `lock bts
/// $bit,(reg)`.
fn bits_set(code: &[u8]) -> BTreeSet<u32> {
    let bit = |bytes: &[u8]| match *bytes {
        [0xf0, 0x48 | 0x49, 0x0f, 0xba, mode, bit] if mode & 0xf8 == 0x28 && bit < 64 => {
            Some(u32::from(bit))
        }
        _ => None,
    };
    code.windows(6).filter_map(bit).collect()
}

/// Reads `TIF_NEED_RESCHED`. `drivers/cpuidle/poll_state.c: poll_idle` tests the bit before its
/// loop and in it (`test $mask,%al`). `resched_curr` tests it too, or, where there is a lazy one
/// beside it, passes its number on (`mov $bit,%esi`).
fn need_resched(poll: &[u8], resched: &[u8]) -> Option<u32> {
    let tests = |code: &[u8]| -> Vec<u8> {
        code.windows(2)
            .filter_map(|bytes| match *bytes {
                [0xa8, mask] if mask.is_power_of_two() => Some(mask),
                _ => None,
            })
            .collect()
    };
    let polled = tests(poll);
    let mask = *polled.first()?;
    if polled.len() < 2 || polled.iter().any(|&other| other != mask) {
        return None;
    }
    let bit = mask.trailing_zeros();
    let number = [0xbe, u8::try_from(bit).ok()?, 0, 0, 0];
    let confirmed = tests(resched).contains(&mask) || resched.windows(5).any(|w| w == number);
    confirmed.then_some(bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: [u8; 8] = [0xa8, 0x10, 0x74, 0x02, 0xa8, 0x10, 0xf3, 0x90];

    #[test]
    fn a_bit_in_both_functions_is_accepted() {
        assert_eq!(need_resched(&POLL, &[0x90, 0xa8, 0x10]), Some(4));
        assert_eq!(need_resched(&POLL, &[0xbe, 4, 0, 0, 0, 0xe9]), Some(4));
    }

    fn sets(bits: &[u8]) -> Vec<u8> {
        let one = |&bit| [0x90, 0xf0, 0x48, 0x0f, 0xba, 0x2f, bit];
        bits.iter().flat_map(one).collect()
    }

    #[test]
    fn the_signal_is_the_bit_that_is_not_the_resume() {
        let (add, throttle) = (sets(&[1, 17, 17]), sets(&[1]));
        for klp in [&[][..], &[17]] {
            assert_eq!(notify_signal(&add, &throttle, &sets(klp)), Some(17));
        }
        assert_eq!(notify_signal(&add, &throttle, &sets(&[2])), None);
        assert_eq!(notify_signal(&add, &throttle, &sets(&[1, 17])), None);
        assert_eq!(notify_signal(&add, &sets(&[3]), &[]), None);
        assert_eq!(notify_signal(&sets(&[1]), &throttle, &[]), None);
        assert_eq!(notify_signal(&sets(&[1, 2, 17]), &throttle, &[]), None);
        assert_eq!(bits_set(&[0x48, 0x0f, 0xba, 0x2f, 5, 0]), BTreeSet::new());
    }

    #[test]
    fn a_bit_that_is_in_doubt_is_not_accepted() {
        assert_eq!(need_resched(&POLL, &[0xbe, 5, 0, 0, 0]), None);
        assert_eq!(need_resched(&POLL[..4], &[0xa8, 0x10]), None);
        let two = [0xa8, 0x10, 0xa8, 0x08];
        assert_eq!(need_resched(&two, &[0xa8, 0x10]), None);
        assert_eq!(need_resched(&[], &[]), None);
    }
}
