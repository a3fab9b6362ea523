//! TIF bits that are not in BTF, read from code that uses them.
//!
//! [`livepatch`](crate::livepatch) reads its own bit. Here is what else is of use, each seen in two functions or not believed.

use crate::reader::KernelMemory;
use crate::symbols::Symbols;

/// Both have fewer bytes.
const MAX_CODE: u64 = 512;

/// TIF bits, as bit numbers. `None` where the code does not show one beyond doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tif {
    /// `TIF_NEED_RESCHED`.
    pub need_resched: Option<u32>,
}

impl Tif {
    pub(crate) fn find(symbols: &Symbols, memory: &KernelMemory<'_>) -> Tif {
        let code = |name| {
            let range = symbols.range(name).ok()?;
            let len = range.len().min(MAX_CODE);
            memory.bytes(range.start, len, 512).ok()
        };
        let need_resched = code("poll_idle")
            .zip(code("resched_curr"))
            .and_then(|(poll, resched)| need_resched(&poll, &resched));
        Tif { need_resched }
    }
}

/// `drivers/cpuidle/poll_state.c: poll_idle` tests the bit before its loop and in it (`test $mask,%al`). `resched_curr` tests it
/// too, or, where there is a lazy one beside it, hands its number on (`mov $bit,%esi`).
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
    fn seen_in_both() {
        assert_eq!(need_resched(&POLL, &[0x90, 0xa8, 0x10]), Some(4));
        assert_eq!(need_resched(&POLL, &[0xbe, 4, 0, 0, 0, 0xe9]), Some(4));
    }

    #[test]
    fn not_believed() {
        assert_eq!(need_resched(&POLL, &[0xbe, 5, 0, 0, 0]), None);
        assert_eq!(need_resched(&POLL[..4], &[0xa8, 0x10]), None);
        let two = [0xa8, 0x10, 0xa8, 0x08];
        assert_eq!(need_resched(&two, &[0xa8, 0x10]), None);
        assert_eq!(need_resched(&[], &[]), None);
    }
}
