//! Telling the processor what will be read soon.
//!
//! A look at thousands of tasks waits for memory most of its time, and for one task after the other. Asked before, the processor
//! fetches what many of them need at once. Knows addresses of our own process only, and reads nothing at them.

#![allow(unsafe_code)]

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Has the cache line at `at` fetched, if there is memory.
pub(crate) fn prefetch(at: *const u8) {
    // SAFETY: the instruction needs SSE, which every x86-64 processor has. It changes nothing that a program can see, and faults at no
    // address, mapped or not (Intel SDM and AMD APM, PREFETCHh), so that `at` may be anything.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_may_be_asked_for() {
        let word = 0x1122_3344_u32;
        let there = std::ptr::from_ref(&word).cast::<u8>();
        for offset in [0, 1, 0xfff, 1 << 20, 1 << 47, usize::MAX] {
            prefetch(there.wrapping_add(offset));
        }
        prefetch(std::ptr::null());
        assert_eq!(word, 0x1122_3344);
    }
}
