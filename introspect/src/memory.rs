//! Guest-physical memory, as a type that can only be read.
//!
//! Knows nothing of page tables or of a kernel. Everything in this crate sees the guest through [`PhysMemory`], which has no
//! way to write: live memory, a core file and a test's byte array all plug in here.

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend};

/// No memory backs (all of) the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
pub struct Unbacked {
    /// Where the read began.
    pub gpa: GuestAddress,
    /// How many bytes were asked for.
    pub len: usize,
}

/// Read access to guest-physical memory.
pub trait PhysMemory {
    /// Fills `buf` from `gpa` on, or fails without saying how much of `buf` was overwritten.
    ///
    /// # Errors
    /// [`Unbacked`] when any byte of the range is not guest RAM.
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), Unbacked>;
}

impl<M: GuestMemory> PhysMemory for M {
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
}
