//! Guest-physical memory, as a type that can only be read.
//!
//! Knows nothing of page tables or of a kernel. Everything in this crate sees the guest through [`PhysMemory`], which has no
//! way to write: live memory, a core file and a test's byte array all plug in here.

pub mod kernel;
pub(crate) mod list;
pub mod paging;
pub(crate) mod prefetch;
pub(crate) mod struct_reader;

use std::collections::VecDeque;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
    VolatileMemory, VolatileSlice,
};

use crate::memory::prefetch::prefetch;

/// So many structures are being fetched while one is compared: more than a processor waits for together, less than its nearest cache holds.
const AHEAD: usize = 16;

/// No memory backs (all of) the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
pub struct OutOfBounds {
    /// Where the read began.
    pub gpa: GuestAddress,
    /// How many bytes were asked for.
    pub len: usize,
}

/// Read access to guest-physical memory, from several threads at once.
pub trait PhysMemory: Sync {
    /// Fills `buf` from `gpa` on, or fails without saying how much of `buf` was overwritten.
    ///
    /// # Errors
    /// [`OutOfBounds`] when any byte of the range is not guest RAM.
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds>;

    /// Fills `buf` with the `parts` of the structure at `gpa`, one behind the other: the same as a read for each, in one go.
    ///
    /// # Errors
    /// As [`read`](Self::read). `buf` is as long as the parts together, or only what fits is filled.
    fn gather(
        &self,
        gpa: GuestAddress,
        parts: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        each_part(parts, buf, |offset, now| {
            self.read(GuestAddress(gpa.0.wrapping_add(offset)), now)
        })
    }

    /// Sets `same` for each structure at `gpas` whose `parts` are just the bytes that stand for it in `bytes`, one structure's behind the
    /// other's. Memory that a processor reads has many of them fetched together and compares them where they are. Of a structure
    /// that is left unset nothing is known: [`gather`](Self::gather) tells.
    fn compare(
        &self,
        _gpas: &[GuestAddress],
        _parts: &[FieldRange],
        _bytes: &[u8],
        _same: &mut [bool],
    ) {
    }
}

/// Bytes from the start of a structure to the end of its last part; none if there are more than a machine has.
pub(crate) fn extent(parts: &[FieldRange]) -> Option<usize> {
    let ends = parts
        .iter()
        .map(|part| part.offset.saturating_add(part.len as u64));
    usize::try_from(ends.max().unwrap_or(0)).ok()
}

/// Whether the parts of the structure that `memory` begins with are just these bytes, one part behind the other.
fn is_there<B: BitmapSlice>(
    memory: &VolatileSlice<'_, B>,
    parts: &[FieldRange],
    bytes: &[u8],
) -> bool {
    let mut rest = bytes;
    parts.iter().all(|part| {
        let (now, later) = rest.split_at(part.len.min(rest.len()));
        rest = later;
        let place = usize::try_from(part.offset).ok();
        place.is_some_and(|place| has(memory, place, now))
    })
}

/// Whether `memory` has these bytes from `at` on. Word by word: to copy first and compare then takes twice as long.
fn has<B: BitmapSlice>(memory: &VolatileSlice<'_, B>, at: usize, bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    let (halves, rest) = rest.as_chunks();
    let halves_at = at + words.len() * 8;
    let rest_at = halves_at + halves.len() * 4;
    let words = words.iter().map(|word| u64::from_ne_bytes(*word));
    let halves = halves.iter().map(|half| u32::from_ne_bytes(*half));
    all_are(memory, at, words)
        && all_are(memory, halves_at, halves)
        && all_are(memory, rest_at, rest.iter().copied())
}

fn all_are<T: ByteValued + PartialEq, B: BitmapSlice>(
    memory: &VolatileSlice<'_, B>,
    at: usize,
    values: impl ExactSizeIterator<Item = T>,
) -> bool {
    if values.len() == 0 {
        return true;
    }
    match memory.get_array_ref::<T>(at, values.len()) {
        Ok(array) => (0..array.len())
            .zip(values)
            .all(|(n, value)| array.load(n) == value),
        Err(_) => false,
    }
}

/// Has every part of a structure read to its place in `buf`.
pub(crate) fn each_part<E>(
    parts: &[FieldRange],
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = buf;
    for part in parts {
        let len = part.len.min(rest.len());
        let (now, later) = rest.split_at_mut(len);
        read(part.offset, now)?;
        rest = later;
    }
    Ok(())
}

/// Some bytes of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldRange {
    /// From the structure's start.
    pub offset: u64,
    /// How many.
    pub len: usize,
}

impl<M: GuestMemory + Sync> PhysMemory for M {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        // Almost all reads are small and lie in one region: an iterator over regions costs more than they do.
        let slice = self
            .physical_memory()
            .and_then(|memory| memory.get_slice(gpa, buf.len()).ok());
        if slice.is_some_and(|slice| slice.copy_to(buf) == buf.len()) {
            return Ok(());
        }
        self.read_slice(buf, gpa).map_err(|_| OutOfBounds {
            gpa,
            len: buf.len(),
        })
    }

    fn gather(
        &self,
        gpa: GuestAddress,
        parts: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        let whole = extent(parts);
        // The structure's region is looked for once.
        let slice = whole.and_then(|whole| self.physical_memory()?.get_slice(gpa, whole).ok());
        each_part(parts, buf, |offset, now| {
            let place = usize::try_from(offset).ok();
            let part = place.and_then(|place| slice.as_ref()?.subslice(place, now.len()).ok());
            if part.is_some_and(|part| part.copy_to(now) == now.len()) {
                return Ok(());
            }
            PhysMemory::read(self, GuestAddress(gpa.0.wrapping_add(offset)), now)
        })
    }

    fn compare(
        &self,
        gpas: &[GuestAddress],
        parts: &[FieldRange],
        bytes: &[u8],
        same: &mut [bool],
    ) {
        let (Some(memory), Some(whole)) = (self.physical_memory(), extent(parts)) else {
            return;
        };
        // Most of them lie in one region.
        let mut last = memory.iter().next();
        let fetch = |gpa: &GuestAddress| {
            let same = last.filter(|region| region.to_region_addr(*gpa).is_some());
            let region = same.or_else(|| memory.find_region(*gpa))?;
            last = Some(region);
            let place = region.get_slice(region.to_region_addr(*gpa)?, whole).ok()?;
            let start = place.ptr_guard().as_ptr();
            let parts = parts
                .iter()
                .filter_map(|part| usize::try_from(part.offset).ok());
            parts.for_each(|offset| prefetch(start.wrapping_add(offset)));
            Some(place)
        };
        let mut to_come = gpas.iter().map(fetch);
        let mut coming: VecDeque<_> = to_come.by_ref().take(AHEAD).collect();
        let len: usize = parts.iter().map(|part| part.len).sum();
        for (bytes, same) in bytes.chunks_exact(len.max(1)).zip(same) {
            let place = coming.pop_front().flatten();
            coming.extend(to_come.next());
            *same = place.is_some_and(|place| is_there(&place, parts, bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const fn part(offset: u64, len: usize) -> FieldRange {
        FieldRange { offset, len }
    }

    /// Two regions, each byte what its address says, more or less.
    fn memory() -> GuestMemoryMmap {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for (start, len) in ranges {
            for at in start.0..start.0 + len as u64 {
                memory
                    .write_obj((at % 251) as u8, GuestAddress(at))
                    .unwrap();
            }
        }
        memory
    }

    #[test]
    fn what_compares_as_the_same_is_what_is_gathered() {
        let memory = memory();
        let gpas = [
            0,
            1,
            0x80,
            0xf00,
            0xf90,
            0xfff,
            0x1000,
            0x8003,
            0x9000,
            1 << 60,
        ]
        .map(GuestAddress);
        let all_parts: [&[FieldRange]; 6] = [
            &[part(0, 56), part(0x60, 8), part(0x70, 4)],
            &[part(3, 1), part(4, 7), part(11, 13)],
            &[part(0, 0)],
            &[],
            &[part(1 << 47, 8)],
            &[part(1 << 62, 8)],
        ];
        for parts in all_parts {
            let len: usize = parts.iter().map(|part| part.len).sum();
            let gathered = gpas.map(|gpa| {
                let mut bytes = vec![0; len];
                PhysMemory::gather(&memory, gpa, parts, &mut bytes).map(|()| bytes)
            });
            let bytes: Vec<u8> = (gathered.iter().cloned())
                .flat_map(|bytes| bytes.unwrap_or_else(|_| vec![0; len]))
                .collect();
            let mut same = [false; 10];
            memory.compare(&gpas, parts, &bytes, &mut same);
            let whole = gathered.each_ref().map(Result::is_ok);
            // Nothing is always the same as nothing, and needs no comparing.
            assert!(len == 0 || same == whole, "{parts:?}: {same:?}, {whole:?}");
            for wrong in 0..len {
                let mut bytes = bytes.clone();
                bytes
                    .chunks_exact_mut(len)
                    .for_each(|bytes| bytes[wrong] ^= 0x10);
                let mut same = [false; 10];
                memory.compare(&gpas, parts, &bytes, &mut same);
                assert_eq!(same, [false; 10], "{parts:?}, byte {wrong}");
            }
        }
    }
}
