//! Guest-physical memory behind a trait that can only read, [`PhysMemory`], and what reads kernel
//! virtual memory through it.
//!
//! Live memory, a core file and a test's byte array all implement the trait. This file knows
//! nothing of page tables or of a kernel.

pub(crate) mod kernel;
pub(crate) mod list;
pub(crate) mod paging;
mod prefetch;
pub(crate) mod struct_reader;

use std::collections::VecDeque;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion,
    VolatileMemory, VolatileSlice,
};

use crate::memory::prefetch::prefetch_line;

pub use crate::memory::kernel::{Field, KernelMemory, ReadCause, ReadError};
pub use crate::memory::paging::{AddressSpace, Mapping, Unmapped};

/// How many structures are prefetched ahead of the one that is compared: more than a processor has
/// outstanding loads for, less than its first-level cache holds.
const PREFETCH_DEPTH: usize = 16;

/// The range is not, or not completely, guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
pub struct OutOfBounds {
    /// Where the read starts.
    pub gpa: GuestAddress,
    /// How many bytes were requested.
    pub len: usize,
}

/// Read access to guest-physical memory, from several threads at once.
///
/// Implemented for every [`vm_memory::GuestMemory`] and for [`CoreFile`](crate::CoreFile).
pub trait PhysMemory: Sync {
    /// Fills `buf` from `gpa` on. On an error, any part of `buf` may have been overwritten.
    ///
    /// # Errors
    /// [`OutOfBounds`] when any byte of the range is not guest RAM.
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds>;

    /// Fills `buf` with the `fields` of the structure at `gpa`, one after the other. The result is
    /// that of one [`read`](Self::read) for each field; an implementation may do it in fewer steps.
    ///
    /// # Errors
    /// [`OutOfBounds`], as for [`read`](Self::read). `buf` should be as long as all fields
    /// together; if it is shorter, only what fits is filled.
    fn read_fields(
        &self,
        gpa: GuestAddress,
        fields: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        each_field(fields, buf, |offset, now| {
            self.read(GuestAddress(gpa.0.wrapping_add(offset)), now)
        })
    }

    /// Sets `same[n]` where the `fields` of the structure at `gpas[n]` are equal to the `n`th group
    /// of `bytes`; `bytes` holds one group a structure, laid out as
    /// [`read_fields`](Self::read_fields) fills its buffer.
    ///
    /// This is a fast path only: where `same[n]` stays unset, the structure may be equal or not,
    /// and [`read_fields`](Self::read_fields) has the answer. The default sets nothing. Memory that
    /// is mapped into this process prefetches many structures at once and compares them in place.
    fn compare(
        &self,
        _gpas: &[GuestAddress],
        _parts: &[FieldRange],
        _bytes: &[u8],
        _same: &mut [bool],
    ) {
    }
}

/// Bytes from the start of a structure to the end of its last field; `None` if that does not fit in
/// `usize`.
pub(crate) fn extent(fields: &[FieldRange]) -> Option<usize> {
    let ends = fields
        .iter()
        .map(|field| field.offset.saturating_add(field.len as u64));
    usize::try_from(ends.max().unwrap_or(0)).ok()
}

/// Whether the structure at the start of `memory` has these bytes in its fields, one field after
/// the other.
fn has_fields<B: BitmapSlice>(
    memory: &VolatileSlice<'_, B>,
    fields: &[FieldRange],
    bytes: &[u8],
) -> bool {
    let mut rest = bytes;
    fields.iter().all(|field| {
        let (now, later) = rest.split_at(field.len.min(rest.len()));
        rest = later;
        let offset = usize::try_from(field.offset).ok();
        offset.is_some_and(|offset| has_bytes(memory, offset, now))
    })
}

/// Whether `memory` has these bytes from `at` on. Compares word by word: copying first takes twice
/// as long.
fn has_bytes<B: BitmapSlice>(memory: &VolatileSlice<'_, B>, at: usize, bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    let (halves, rest) = rest.as_chunks();
    let halves_at = at + words.len() * 8;
    let rest_at = halves_at + halves.len() * 4;
    let words = words.iter().map(|word| u64::from_ne_bytes(*word));
    let halves = halves.iter().map(|half| u32::from_ne_bytes(*half));
    has_values(memory, at, words)
        && has_values(memory, halves_at, halves)
        && has_values(memory, rest_at, rest.iter().copied())
}

fn has_values<T: ByteValued + PartialEq, B: BitmapSlice>(
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

/// Calls `read` for each field with the field's offset and its part of `buf`.
pub(crate) fn each_field<E>(
    fields: &[FieldRange],
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = buf;
    for field in fields {
        let len = field.len.min(rest.len());
        let (now, later) = rest.split_at_mut(len);
        read(field.offset, now)?;
        rest = later;
    }
    Ok(())
}

/// A range of bytes within a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldRange {
    /// Bytes from the start of the structure.
    pub offset: u64,
    /// Length in bytes.
    pub len: usize,
}

impl<M: GuestMemory + Sync> PhysMemory for M {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        // Almost all reads are small and within one region: an iterator over regions costs more
        // than the read itself.
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

    fn read_fields(
        &self,
        gpa: GuestAddress,
        fields: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        let size = extent(fields);
        // The structure's region is looked up once.
        let slice = size.and_then(|size| self.physical_memory()?.get_slice(gpa, size).ok());
        each_field(fields, buf, |offset, now| {
            let offset_in_slice = usize::try_from(offset).ok();
            let field = offset_in_slice.and_then(|at| slice.as_ref()?.subslice(at, now.len()).ok());
            if field.is_some_and(|field| field.copy_to(now) == now.len()) {
                return Ok(());
            }
            PhysMemory::read(self, GuestAddress(gpa.0.wrapping_add(offset)), now)
        })
    }

    fn compare(
        &self,
        gpas: &[GuestAddress],
        fields: &[FieldRange],
        bytes: &[u8],
        same: &mut [bool],
    ) {
        let (Some(memory), Some(size)) = (self.physical_memory(), extent(fields)) else {
            return;
        };
        // Most structures are in one region.
        let mut last = memory.iter().next();
        let fetch = |gpa: &GuestAddress| {
            let same_region = last.filter(|region| region.to_region_addr(*gpa).is_some());
            let region = same_region.or_else(|| memory.find_region(*gpa))?;
            last = Some(region);
            let slice = region.get_slice(region.to_region_addr(*gpa)?, size).ok()?;
            let start = slice.ptr_guard().as_ptr();
            let fields = fields
                .iter()
                .filter_map(|field| usize::try_from(field.offset).ok());
            fields.for_each(|offset| prefetch_line(start.wrapping_add(offset)));
            Some(slice)
        };
        let mut slices = gpas.iter().map(fetch);
        let mut prefetched: VecDeque<_> = slices.by_ref().take(PREFETCH_DEPTH).collect();
        let len: usize = fields.iter().map(|field| field.len).sum();
        for (bytes, same) in bytes.chunks_exact(len.max(1)).zip(same) {
            let slice = prefetched.pop_front().flatten();
            prefetched.extend(slices.next());
            *same = slice.is_some_and(|slice| has_fields(&slice, fields, bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const fn field(offset: u64, len: usize) -> FieldRange {
        FieldRange { offset, len }
    }

    /// Two regions; each byte is its address modulo 251.
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
    fn equal_means_that_read_fields_returns_these_bytes() {
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
        let all_fields: [&[FieldRange]; 6] = [
            &[field(0, 56), field(0x60, 8), field(0x70, 4)],
            &[field(3, 1), field(4, 7), field(11, 13)],
            &[field(0, 0)],
            &[],
            &[field(1 << 47, 8)],
            &[field(1 << 62, 8)],
        ];
        for fields in all_fields {
            let len: usize = fields.iter().map(|field| field.len).sum();
            let read = gpas.map(|gpa| {
                let mut bytes = vec![0; len];
                PhysMemory::read_fields(&memory, gpa, fields, &mut bytes).map(|()| bytes)
            });
            let bytes: Vec<u8> = (read.iter().cloned())
                .flat_map(|bytes| bytes.unwrap_or_else(|_| vec![0; len]))
                .collect();
            let mut same = [false; 10];
            memory.compare(&gpas, fields, &bytes, &mut same);
            let readable = read.each_ref().map(Result::is_ok);
            // Zero bytes are always equal, and need no comparison.
            assert!(
                len == 0 || same == readable,
                "{fields:?}: {same:?}, {readable:?}"
            );
            for wrong in 0..len {
                let mut bytes = bytes.clone();
                bytes
                    .chunks_exact_mut(len)
                    .for_each(|bytes| bytes[wrong] ^= 0x10);
                let mut same = [false; 10];
                memory.compare(&gpas, fields, &bytes, &mut same);
                assert_eq!(same, [false; 10], "{fields:?}, byte {wrong}");
            }
        }
    }
}
