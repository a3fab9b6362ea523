//! Prefetching memory of this process that will be read soon.
//!
//! Reading thousands of tasks waits for memory most of the time, one task after the other.
//! Prefetched, many cache lines are on their way at once. This module knows addresses of this
//! process only, and reads nothing at them.

#![allow(unsafe_code)]

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Prefetches the cache line at `at`, if it is mapped.
pub(crate) fn prefetch_line(at: *const u8) {
    // SAFETY: the instruction needs SSE, which every x86-64 processor has. It has no architectural
    // effect and faults at no address, mapped or not (Intel SDM and AMD APM, PREFETCHh), so `at`
    // may have any value.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_may_be_prefetched() {
        let word = 0x1122_3344_u32;
        let mapped = std::ptr::from_ref(&word).cast::<u8>();
        for offset in [0, 1, 0xfff, 1 << 20, 1 << 47, usize::MAX] {
            prefetch_line(mapped.wrapping_add(offset));
        }
        prefetch_line(std::ptr::null());
        assert_eq!(word, 0x1122_3344);
    }
}
