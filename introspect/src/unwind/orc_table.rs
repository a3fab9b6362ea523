//! [`OrcTable`]: a copy of an ORC table, with fast lookup by code address.
//!
//! This module knows how a table is sorted and searched (`arch/x86/kernel/unwind_orc.c:
//! __orc_find`); it must not know where it came from. A table does not say where the code that it
//! describes ends: the caller must check that first.

use crate::addr::Gva;
use crate::unwind::orc::{ENTRY_SIZE, OrcEncoding, OrcEntry, OrcKind, RawOrcEntry};

/// The most entries that are accepted in one table; a stock kernel has half a million.
pub const MAX_ENTRIES: usize = 2 << 20;

/// Why an ORC table cannot be one that a kernel made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OrcTableError {
    /// The table has no entry.
    #[error("ORC table is empty")]
    Empty,
    /// The table has more entries than any kernel has.
    #[error("ORC table has {0} entries; at most {MAX_ENTRIES} are accepted")]
    TooLong(u64),
    /// The two parallel arrays differ in length.
    #[error("ORC table has {ips} addresses and {entries} entries")]
    Mismatch {
        /// The length of the array of addresses.
        ips: usize,
        /// The length of the array of entries.
        entries: usize,
    },
    /// The addresses are not ascending at this index: the kernel needs them sorted too.
    #[error("ORC table is not sorted at entry {0}")]
    Unsorted(usize),
    /// The addresses span more bytes than kernel text can.
    #[error("ORC table spans {0:#x} bytes, more than kernel text can")]
    TooWide(u64),
    /// The encoding has no meaning for an entry.
    #[error("ORC entry {index} ({raw:02x?}) has no meaning in this kernel's encoding")]
    BadEntry {
        /// The entry's index.
        index: usize,
        /// The entry's bytes.
        raw: RawOrcEntry,
    },
    /// No known encoding decodes the whole table, or several do.
    #[error("ORC table is in no known encoding")]
    UnknownEncoding,
}

/// A sorted ORC table, with a coarse index that narrows the binary search.
#[derive(Clone, Debug)]
pub struct OrcTable {
    encoding: OrcEncoding,
    /// The address of the first entry; the others are stored relative to it.
    base: Gva,
    starts: Vec<u32>,
    entries: Vec<RawOrcEntry>,
    /// For each block of `1 << shift` bytes from `base` on: the last entry that starts at or before
    /// the block.
    index: Vec<u32>,
    shift: u32,
}

impl OrcTable {
    /// Makes a table from the kernel's two arrays: self-relative 32-bit addresses, the first of
    /// them at `ips_at`, and entries.
    ///
    /// # Errors
    /// [`OrcTableError`] for a table that no kernel has.
    pub fn from_sections(
        ips_at: Gva,
        ips: &[u8],
        entries: &[u8],
        encoding: OrcEncoding,
    ) -> Result<OrcTable, OrcTableError> {
        let (ips, _) = ips.as_chunks::<4>();
        let (entries, _) = entries.as_chunks::<ENTRY_SIZE>();
        let addresses = ips.iter().zip(0u64..).map(|(raw, i)| {
            ips_at
                .add(4 * i)
                .offset(i64::from(i32::from_le_bytes(*raw)))
        });
        Self::build(addresses, ips.len(), entries.to_vec(), encoding)
    }

    /// Makes a table from entries in any order, as an object file has them: the result is that of
    /// `unwind_module_init`.
    ///
    /// # Errors
    /// [`OrcTableError`] for a table that no kernel has.
    pub fn from_unsorted(
        mut entries: Vec<(Gva, RawOrcEntry)>,
        encoding: OrcEncoding,
    ) -> Result<OrcTable, OrcTableError> {
        // A section's terminator gives way to a real entry at the same address (`orc_sort_cmp`).
        let real = |raw: &RawOrcEntry| {
            encoding
                .decode(*raw)
                .is_some_and(|entry| entry.kind != OrcKind::Undefined)
        };
        entries.sort_by_key(|(at, raw)| (*at, real(raw)));
        let raws = entries.iter().map(|(_, raw)| *raw).collect();
        let count = entries.len();
        Self::build(entries.into_iter().map(|(at, _)| at), count, raws, encoding)
    }

    fn build(
        addresses: impl Iterator<Item = Gva>,
        count: usize,
        entries: Vec<RawOrcEntry>,
        encoding: OrcEncoding,
    ) -> Result<OrcTable, OrcTableError> {
        if count != entries.len() {
            return Err(OrcTableError::Mismatch {
                ips: count,
                entries: entries.len(),
            });
        }
        if count > MAX_ENTRIES {
            return Err(OrcTableError::TooLong(count as u64));
        }
        let mut base = None;
        let mut starts = Vec::with_capacity(count);
        let mut last = 0u32;
        for (index, at) in addresses.enumerate() {
            let base = *base.get_or_insert(at);
            let start =
                u32::try_from(at.since(base)).map_err(|_| too_wide_or_unsorted(base, at, index))?;
            if start < last {
                return Err(OrcTableError::Unsorted(index));
            }
            last = start;
            starts.push(start);
        }
        if let Some((index, raw)) = entries
            .iter()
            .enumerate()
            .find(|(_, raw)| encoding.decode(**raw).is_none())
        {
            return Err(OrcTableError::BadEntry { index, raw: *raw });
        }
        let base = base.ok_or(OrcTableError::Empty)?;
        let (index, shift) = coarse_index(&starts);
        Ok(OrcTable {
            encoding,
            base,
            starts,
            entries,
            index,
            shift,
        })
    }

    /// The entry that applies at `at`: the last one that starts at or before it.
    #[must_use]
    pub fn lookup(&self, at: Gva) -> Option<OrcEntry> {
        let offset = u32::try_from(at.since(self.base)).ok()?;
        let block = usize::try_from(offset >> self.shift).ok()?;
        let first = self.index_at(block);
        let end = self.index_at(block + 1).saturating_add(1);
        let run = self.starts.get(first..end)?;
        let after = run.partition_point(|start| *start <= offset);
        let found = first + after.checked_sub(1)?;
        self.encoding.decode(*self.entries.get(found)?)
    }

    /// All blocks after the last one belong to the last entry.
    fn index_at(&self, block: usize) -> usize {
        self.index
            .get(block)
            .map_or(self.starts.len().saturating_sub(1), |i| *i as usize)
    }

    /// The encoding of the entries.
    #[must_use]
    pub fn encoding(&self) -> OrcEncoding {
        self.encoding
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no entry; always false, as an empty table cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// All entries in order of address, for checks and listings.
    pub fn iter(&self) -> impl Iterator<Item = (Gva, OrcEntry)> + '_ {
        self.starts.iter().zip(&self.entries).map(|(start, raw)| {
            let entry = self.encoding.decode(*raw).unwrap_or(OrcEntry::UNDEFINED);
            (self.base.add(u64::from(*start)), entry)
        })
    }
}

/// An address below the first one does not fit either: there, the order is wrong.
fn too_wide_or_unsorted(base: Gva, at: Gva, index: usize) -> OrcTableError {
    if at < base {
        OrcTableError::Unsorted(index)
    } else {
        OrcTableError::TooWide(at.since(base))
    }
}

/// About one block for each entry: the binary search is left with some four entries in a stock
/// kernel's text.
fn coarse_index(starts: &[u32]) -> (Vec<u32>, u32) {
    let span = starts.last().copied().unwrap_or(0);
    let mut shift = 6;
    while u64::from(span >> shift) > starts.len() as u64 {
        shift += 1;
    }
    let mut index = Vec::with_capacity((span >> shift) as usize + 1);
    let mut last = 0u32;
    for block in 0..=(span >> shift) {
        let begin = u64::from(block) << shift;
        while starts
            .get(last as usize + 1)
            .is_some_and(|next| u64::from(*next) <= begin)
        {
            last += 1;
        }
        index.push(last);
    }
    (index, shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::unwind::orc::OrcBase;

    const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

    fn call(offset: i16) -> RawOrcEntry {
        let [a, b] = offset.to_le_bytes();
        [a, b, 0, 0, 5, 2]
    }

    const HOLE: RawOrcEntry = [0; 6];

    /// The two sections as a linker lays them out for entries at `addresses`.
    fn sections(at: Gva, addresses: &[Gva], raws: &[RawOrcEntry]) -> (Vec<u8>, Vec<u8>) {
        let mut ips = Vec::new();
        for (slot, address) in (0u64..).step_by(4).zip(addresses) {
            let relative = address.since(at.add(slot)).cast_signed();
            ips.extend(i32::try_from(relative).unwrap().to_le_bytes());
        }
        (ips, raws.concat())
    }

    #[test]
    fn lookup_finds_the_entry_in_force() {
        let addresses = [TEXT, TEXT.add(1), TEXT.add(0x100), TEXT.add(0x10_0000)];
        let raws = [call(8), call(16), HOLE, call(24)];
        let at = TEXT.add(0x80_0000);
        let (ips, entries) = sections(at, &addresses, &raws);
        let table = OrcTable::from_sections(at, &ips, &entries, OrcEncoding::Typed).unwrap();
        let offset = |ip| table.lookup(ip).map(|e| (e.kind, e.sp_offset));
        assert_eq!(offset(TEXT.sub(1)), None);
        assert_eq!(offset(TEXT), Some((OrcKind::Call, 8)));
        assert_eq!(offset(TEXT.add(1)), Some((OrcKind::Call, 16)));
        assert_eq!(offset(TEXT.add(0xff)), Some((OrcKind::Call, 16)));
        assert_eq!(offset(TEXT.add(0x100)), Some((OrcKind::Undefined, 0)));
        assert_eq!(offset(TEXT.add(0xf_ffff)), Some((OrcKind::Undefined, 0)));
        assert_eq!(offset(TEXT.add(0x10_0000)), Some((OrcKind::Call, 24)));
        assert_eq!(offset(TEXT.add(0xffff_ffff)), Some((OrcKind::Call, 24)));
        assert_eq!(offset(TEXT.add(1 << 32)), None);
    }

    #[test]
    fn the_rightmost_of_equal_addresses_wins_and_terminators_yield() {
        let table = OrcTable::from_unsorted(
            vec![
                (TEXT.add(16), call(32)),
                (TEXT.add(8), call(16)),
                (TEXT.add(8), HOLE),
                (TEXT, call(8)),
            ],
            OrcEncoding::Typed,
        )
        .unwrap();
        assert_eq!(table.lookup(TEXT.add(8)).unwrap().sp_offset, 16);
        assert_eq!(table.lookup(TEXT.add(17)).unwrap().sp_base, OrcBase::Sp);
        assert_eq!(table.len(), 4);
    }

    #[test]
    fn tables_that_no_kernel_has_are_refused() {
        let build = |addresses: &[Gva], raws: &[RawOrcEntry]| {
            let (ips, entries) = sections(TEXT, addresses, raws);
            OrcTable::from_sections(TEXT, &ips, &entries, OrcEncoding::Typed).map(|t| t.len())
        };
        assert_eq!(build(&[], &[]), Err(OrcTableError::Empty));
        assert_eq!(
            build(&[TEXT.add(8), TEXT], &[call(8), call(8)]),
            Err(OrcTableError::Unsorted(1))
        );
        assert_eq!(
            build(&[TEXT, TEXT.add(9), TEXT.add(8)], &[call(8); 3]),
            Err(OrcTableError::Unsorted(2))
        );
        assert_eq!(
            build(&[TEXT], &[call(8), call(8)]),
            Err(OrcTableError::Mismatch { ips: 1, entries: 2 })
        );
        assert!(matches!(
            build(&[TEXT], &[[0xff; 6]]),
            Err(OrcTableError::BadEntry { index: 0, .. })
        ));
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            mut offsets in prop::collection::vec(0u32..0x40_0000, 1..200),
            probes in prop::collection::vec(0u32..0x41_0000, 50),
        ) {
            offsets.sort_unstable();
            let entries: Vec<_> = offsets
                .iter()
                .zip(0i16..)
                .map(|(o, i)| (TEXT.add(u64::from(*o)), call(i)))
                .collect();
            let table = OrcTable::from_unsorted(entries.clone(), OrcEncoding::Typed).unwrap();
            for probe in probes {
                let ip = TEXT.add(u64::from(probe));
                let expected = entries.iter().rfind(|(at, _)| *at <= ip).map(|(_, raw)| *raw);
                prop_assert_eq!(
                    table.lookup(ip),
                    expected.and_then(|raw| OrcEncoding::Typed.decode(raw))
                );
            }
        }

        #[test]
        fn any_sections_build_or_fail(
            at in any::<u64>(),
            ips in prop::collection::vec(any::<u8>(), 0..64),
            entries in prop::collection::vec(any::<u8>(), 0..96),
            ip in any::<u64>(),
        ) {
            for encoding in OrcEncoding::ALL {
                if let Ok(table) = OrcTable::from_sections(Gva(at), &ips, &entries, encoding) {
                    let _ = table.lookup(Gva(ip));
                }
            }
        }
    }
}
