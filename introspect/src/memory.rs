//! Guest-physical memory, as a type that can only be read.
//!
//! Knows nothing of page tables or of a kernel. Everything in this crate sees the guest through [`PhysMemory`], which has no
//! way to write: live memory, a core file and a test's byte array all plug in here.

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend};

use crate::prefetch::prefetch;

/// No memory backs (all of) the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
pub struct Unbacked {
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
    /// [`Unbacked`] when any byte of the range is not guest RAM.
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), Unbacked>;

    /// Fills `buf` with the `parts` of the structure at `gpa`, one behind the other: the same as a read for each, in one go.
    ///
    /// # Errors
    /// As [`read`](Self::read). `buf` is as long as the parts together, or only what fits is filled.
    fn gather(&self, gpa: GuestAddress, parts: &[Part], buf: &mut [u8]) -> Result<(), Unbacked> {
        each_part(parts, buf, |offset, now| {
            self.read(GuestAddress(gpa.0.wrapping_add(offset)), now)
        })
    }

    /// Says that the `parts` of the structure at `gpa` will be gathered soon. Memory that can be asked for many at once begins to
    /// fetch them; nothing else comes of it, whatever the address.
    fn prefetch(&self, _gpa: GuestAddress, _parts: &[Part]) {}
}

/// Has every part of a structure read to its place in `buf`.
pub(crate) fn each_part<E>(
    parts: &[Part],
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
pub struct Part {
    /// From the structure's start.
    pub offset: u64,
    /// How many.
    pub len: usize,
}

impl<M: GuestMemory + Sync> PhysMemory for M {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), Unbacked> {
        // Almost all reads are small and lie in one region: an iterator over regions costs more than they do.
        let slice = self
            .physical_memory()
            .and_then(|memory| memory.get_slice(gpa, buf.len()).ok());
        if slice.is_some_and(|slice| slice.copy_to(buf) == buf.len()) {
            return Ok(());
        }
        self.read_slice(buf, gpa).map_err(|_| Unbacked {
            gpa,
            len: buf.len(),
        })
    }

    fn gather(&self, gpa: GuestAddress, parts: &[Part], buf: &mut [u8]) -> Result<(), Unbacked> {
        let ends = parts
            .iter()
            .map(|part| part.offset.saturating_add(part.len as u64));
        let whole = ends.max().and_then(|end| usize::try_from(end).ok());
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

    fn prefetch(&self, gpa: GuestAddress, parts: &[Part]) {
        let slice = self
            .physical_memory()
            .and_then(|memory| memory.get_slice(gpa, 1).ok());
        let Some(start) = slice.map(|slice| slice.ptr_guard().as_ptr()) else {
            return;
        };
        for part in parts {
            // Where it leads out of the region, it is of no use and does no harm.
            prefetch(start.wrapping_add(usize::try_from(part.offset).unwrap_or(0)));
        }
    }
}
