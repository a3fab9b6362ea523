//! A first-fit allocator over a range of addresses.
//!
//! This module knows addresses only; what lies there is the caller's concern.

use introspect::{Gva, GvaRange};

/// A range of addresses, parts of which are allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeAllocator {
    range: GvaRange,
    /// Sorted by address, disjoint.
    allocated: Vec<GvaRange>,
}

impl RangeAllocator {
    /// A range with nothing allocated.
    #[must_use]
    pub fn new(range: GvaRange) -> RangeAllocator {
        RangeAllocator {
            range,
            allocated: Vec::new(),
        }
    }

    /// The whole range, allocated or not.
    #[must_use]
    pub fn range(&self) -> GvaRange {
        self.range
    }

    /// Whether nothing is allocated.
    #[cfg(test)]
    pub fn is_free(&self) -> bool {
        self.allocated.is_empty()
    }

    /// Allocates the lowest `len` free bytes that begin at a multiple of `align`; `None` when there
    /// is no such gap. A `len` of zero allocates one byte, so that every allocation has an address
    /// of its own.
    pub fn allocate(&mut self, len: u64, align: u64) -> Option<GvaRange> {
        let len = len.max(1);
        let mut from = self.range.start.0;
        let ends = self
            .allocated
            .iter()
            .map(|range| (range.start.0, range.end.0));
        let last = (self.range.end.0, u64::MAX);
        let mut found = None;
        for (index, (gap_end, next)) in ends.chain([last]).enumerate() {
            let start = from.checked_next_multiple_of(align.max(1))?;
            let end = start.checked_add(len)?;
            if end <= gap_end {
                found = Some((index, GvaRange::new(Gva(start), Gva(end))));
                break;
            }
            from = next;
        }
        let (index, range) = found?;
        self.allocated.insert(index, range);
        Some(range)
    }

    /// Frees what [`allocate`](Self::allocate) returned.
    pub fn free(&mut self, range: GvaRange) {
        self.allocated.retain(|allocated| *allocated != range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> RangeAllocator {
        RangeAllocator::new(GvaRange::new(Gva(0x1004), Gva(0x1100)))
    }

    #[test]
    fn allocates_the_lowest_aligned_gap_and_reuses_it() {
        let mut allocator = allocator();
        let a = allocator.allocate(0x20, 16).unwrap();
        let b = allocator.allocate(0x20, 16).unwrap();
        let c = allocator.allocate(0x20, 16).unwrap();
        assert_eq!(
            (a.start, b.start, c.start),
            (Gva(0x1010), Gva(0x1030), Gva(0x1050))
        );
        allocator.free(b);
        assert_eq!(allocator.allocate(0x21, 16).unwrap().start, Gva(0x1070));
        assert_eq!(allocator.allocate(0x10, 16).unwrap().start, Gva(0x1030));
        assert_eq!(allocator.allocate(0x10, 16).unwrap().start, Gva(0x1040));
    }

    #[test]
    fn returns_none_when_full_or_for_absurd_sizes() {
        let mut allocator = allocator();
        assert_eq!(allocator.allocate(0x100, 1), None);
        assert_eq!(allocator.allocate(u64::MAX, 1), None);
        assert_eq!(allocator.allocate(1, 1 << 63), None);
        let all = allocator.allocate(0xfc, 1).unwrap();
        assert_eq!(allocator.allocate(0, 1), None);
        allocator.free(all);
        assert!(allocator.is_free());
    }

    #[test]
    fn repeated_allocation_does_not_leak() {
        let mut allocator = allocator();
        for _ in 0..1000 {
            let a = allocator.allocate(100, 16).unwrap();
            let b = allocator.allocate(40, 16).unwrap();
            allocator.free(a);
            allocator.free(b);
        }
        assert!(allocator.is_free());
    }
}
