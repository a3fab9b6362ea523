//! Synthetic guest memory for this crate's unit tests.

use vm_memory::GuestAddress;

use crate::memory::{OutOfBounds, PhysMemory};

/// RAM that starts at physical address 0.
#[derive(Debug)]
pub(crate) struct Ram(pub(crate) Vec<u8>);

impl Ram {
    pub(crate) fn new(len: usize) -> Ram {
        Ram(vec![0; len])
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
}

impl PhysMemory for Ram {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let out_of_bounds = OutOfBounds {
            gpa,
            len: buf.len(),
        };
        let start = usize::try_from(gpa.0).map_err(|_| out_of_bounds)?;
        let end = start.checked_add(buf.len()).ok_or(out_of_bounds)?;
        buf.copy_from_slice(self.0.get(start..end).ok_or(out_of_bounds)?);
        Ok(())
    }
}
