//! Who has which part of a range: a first-fit allocator over addresses.
//!
//! Knows addresses only; what lies there is the caller's.

use introspect::{Gva, GvaRange};

/// A range of addresses, parts of which are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeAllocator {
    range: GvaRange,
    /// Sorted by address, disjoint.
    taken: Vec<GvaRange>,
}

impl RangeAllocator {
    /// A range with nothing taken.
    #[must_use]
    pub fn new(range: GvaRange) -> RangeAllocator {
        RangeAllocator {
            range,
            taken: Vec::new(),
        }
    }

    /// The whole range.
    #[must_use]
    pub fn range(&self) -> GvaRange {
        self.range
    }

    /// Whether nothing is taken.
    #[cfg(test)]
    pub fn is_free(&self) -> bool {
        self.taken.is_empty()
    }

    /// Takes the lowest `len` free bytes that begin at a multiple of `align`, or `None` when there is no such gap. A `len` of
    /// zero takes one byte, so that every taking has an address of its own.
    pub fn take(&mut self, len: u64, align: u64) -> Option<GvaRange> {
        let len = len.max(1);
        let mut from = self.range.start.0;
        let ends = self.taken.iter().map(|t| (t.start.0, t.end.0));
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
        self.taken.insert(index, range);
        Some(range)
    }

    /// Gives back what [`take`](Self::take) gave.
    pub fn free(&mut self, range: GvaRange) {
        self.taken.retain(|taken| *taken != range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room() -> RangeAllocator {
        RangeAllocator::new(GvaRange::new(Gva(0x1004), Gva(0x1100)))
    }

    #[test]
    fn takes_lowest_aligned_gap_and_reuses() {
        let mut room = room();
        let a = room.take(0x20, 16).unwrap();
        let b = room.take(0x20, 16).unwrap();
        let c = room.take(0x20, 16).unwrap();
        assert_eq!(
            (a.start, b.start, c.start),
            (Gva(0x1010), Gva(0x1030), Gva(0x1050))
        );
        room.free(b);
        assert_eq!(room.take(0x21, 16).unwrap().start, Gva(0x1070));
        assert_eq!(room.take(0x10, 16).unwrap().start, Gva(0x1030));
        assert_eq!(room.take(0x10, 16).unwrap().start, Gva(0x1040));
    }

    #[test]
    fn says_when_full_and_survives_absurd_sizes() {
        let mut room = room();
        assert_eq!(room.take(0x100, 1), None);
        assert_eq!(room.take(u64::MAX, 1), None);
        assert_eq!(room.take(1, 1 << 63), None);
        let all = room.take(0xfc, 1).unwrap();
        assert_eq!(room.take(0, 1), None);
        room.free(all);
        assert!(room.is_free());
    }

    #[test]
    fn rounds_do_not_leak() {
        let mut room = room();
        for _ in 0..1000 {
            let a = room.take(100, 16).unwrap();
            let b = room.take(40, 16).unwrap();
            room.free(a);
            room.free(b);
        }
        assert!(room.is_free());
    }
}
