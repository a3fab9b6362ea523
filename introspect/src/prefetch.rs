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
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use crate::memory::{Part, PhysMemory};

    #[test]
    fn whatever_is_fetched_memory_stays_as_it_is() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        memory.write_obj(0x1122_3344_u32, GuestAddress(8)).unwrap();
        let offsets = [0, 8, 0xfff, 0x1000, 1 << 47, u64::MAX];
        let parts = offsets.map(|offset| Part { offset, len: 8 });
        for gpa in [0, 0xfff, 0x1000, 0x8000, 0x9000, u64::MAX] {
            PhysMemory::prefetch(&memory, GuestAddress(gpa), &parts);
        }
        let word = memory.read_obj::<u32>(GuestAddress(8)).unwrap();
        assert_eq!(word, 0x1122_3344);
    }
}
