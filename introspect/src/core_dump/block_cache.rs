//! A cache of blocks of a core file, for small reads.
//!
//! A system call for each field of each structure would cost more than all other work on it. Data
//! that is together in memory is together in the file: page tables, the structures of one slab, the
//! top of a stack. This module knows files and blocks; it must not know what a core is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// Bytes of a block: one page, since data that is contiguous for the guest need not be in physical
/// memory.
pub(crate) const BLOCK_SIZE: usize = 4096;
/// The number of blocks in the cache; a power of two. Together they take 2 MiB.
const SLOTS: u64 = 512;
/// Longer reads bypass the cache.
const MAX_CACHED_READ: usize = 1024;

/// A block of the file, with its number.
#[derive(Debug)]
struct Block {
    number: u64,
    bytes: Box<[u8; BLOCK_SIZE]>,
}

/// A file with the blocks that were read last, direct-mapped by block number. Threads wait for each
/// other only on the same slot.
#[derive(Debug)]
pub(crate) struct CachedFile {
    file: File,
    slots: Box<[Mutex<Option<Block>>]>,
}

impl CachedFile {
    pub(crate) fn new(file: File) -> CachedFile {
        CachedFile {
            file,
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The operating system's error, also when the file ends too early.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.len() <= MAX_CACHED_READ && self.copy_blocks(buf, offset).is_some() {
            return Ok(());
        }
        self.file.read_exact_at(buf, offset)
    }

    /// Copies from cached blocks. `None` when a block cannot be read whole, as at the end of the
    /// file.
    fn copy_blocks(&self, buf: &mut [u8], offset: u64) -> Option<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let from = usize::try_from(at % BLOCK_SIZE as u64).ok()?;
            let len = rest.len().min(BLOCK_SIZE - from);
            let (now, later) = rest.split_at_mut_checked(len)?;
            self.copy_block(now, at / BLOCK_SIZE as u64, from)?;
            at = at.checked_add(len as u64)?;
            rest = later;
        }
        Some(())
    }

    /// Fills `buf` from byte `from` of block `number` on.
    fn copy_block(&self, buf: &mut [u8], number: u64, from: usize) -> Option<()> {
        let slot = self.slots.get(usize::try_from(number % SLOTS).ok()?)?;
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|block| block.number != number) {
            // The block is taken out while it is filled: a failed read must leave nothing in the
            // slot.
            let mut bytes = match kept.take() {
                Some(old) => old.bytes,
                None => Box::new([0; BLOCK_SIZE]),
            };
            let at = number.checked_mul(BLOCK_SIZE as u64)?;
            self.file.read_exact_at(&mut bytes[..], at).ok()?;
            *kept = Some(Block { number, bytes });
        }
        let bytes = kept.as_ref()?.bytes.get(from..)?;
        buf.copy_from_slice(bytes.get(..buf.len())?);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core_dump::tests::file;

    #[test]
    fn cached_or_not_the_bytes_are_those_of_the_file() {
        let len = BLOCK_SIZE * (usize::try_from(SLOTS).unwrap() + 3) + 100;
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        let cached = CachedFile::new(file(&bytes));
        let slots = BLOCK_SIZE * usize::try_from(SLOTS).unwrap();
        // Two blocks of one slot in turn, reads across blocks, and reads at the end of the file.
        let offsets = [
            0,
            slots,
            0,
            slots + 8,
            BLOCK_SIZE - 3,
            len - 101,
            len - 50,
            len - 7,
            len,
        ];
        for at in offsets {
            for size in [
                0,
                1,
                7,
                8,
                100,
                MAX_CACHED_READ,
                MAX_CACHED_READ + 1,
                2 * BLOCK_SIZE,
            ] {
                let mut buf = vec![0xaa; size];
                let read = cached.read_exact_at(&mut buf, at as u64);
                let expected = bytes.get(at..at + size);
                assert_eq!(read.is_ok(), expected.is_some(), "{size} at {at}");
                if let Some(expected) = expected {
                    assert_eq!(buf, expected, "{size} at {at}");
                }
            }
        }
        let mut buf = [0; 8];
        assert!(cached.read_exact_at(&mut buf, u64::MAX - 3).is_err());
    }
}
