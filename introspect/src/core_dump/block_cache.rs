//! Small reads of a core file, a block at a time.
//!
//! A system call for each field of each structure costs more than all else that is done with it. What lies together in memory
//! lies together in the file: page tables, the structures of one slab, the top of a stack. Knows files and blocks, not what a core is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// Bytes of a block: a page, as nothing of a guest goes on in the next one.
pub(crate) const BLOCK: usize = 4096;
/// Blocks that are kept; a power of two. Together 2 MiB.
const SLOTS: u64 = 512;
/// Reads of more are done at once.
const SMALL: usize = 1024;

/// A block of the file, by its number.
#[derive(Debug)]
struct Block {
    number: u64,
    bytes: Box<[u8; BLOCK]>,
}

/// A file with the blocks that were read last, one for each slot that its number leads to. Threads wait for each other only at one
/// slot.
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
    /// What the operating system says, also when the file ends before.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.len() <= SMALL && self.copy_blocks(buf, offset).is_some() {
            return Ok(());
        }
        self.file.read_exact_at(buf, offset)
    }

    /// `None` when a block cannot be had: the end of the file is in none.
    fn copy_blocks(&self, buf: &mut [u8], offset: u64) -> Option<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let from = usize::try_from(at % BLOCK as u64).ok()?;
            let len = rest.len().min(BLOCK - from);
            let (now, later) = rest.split_at_mut_checked(len)?;
            self.copy_of_block(now, at / BLOCK as u64, from)?;
            at = at.checked_add(len as u64)?;
            rest = later;
        }
        Some(())
    }

    /// Fills `buf` with what lies in block `number` from byte `from` on.
    fn copy_of_block(&self, buf: &mut [u8], number: u64, from: usize) -> Option<()> {
        let slot = self.slots.get(usize::try_from(number % SLOTS).ok()?)?;
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|block| block.number != number) {
            // Taken out while it is filled: what could not be read is not kept.
            let mut bytes = match kept.take() {
                Some(old) => old.bytes,
                None => Box::new([0; BLOCK]),
            };
            let at = number.checked_mul(BLOCK as u64)?;
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
    fn small_or_large_the_bytes_are_those_of_the_file() {
        let len = BLOCK * (usize::try_from(SLOTS).unwrap() + 3) + 100;
        let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        let cached = CachedFile::new(file(&bytes));
        let slots = BLOCK * usize::try_from(SLOTS).unwrap();
        // Two blocks of one slot in turn, across blocks, and where the file ends.
        let places = [
            0,
            slots,
            0,
            slots + 8,
            BLOCK - 3,
            len - 101,
            len - 50,
            len - 7,
            len,
        ];
        for at in places {
            for size in [0, 1, 7, 8, 100, SMALL, SMALL + 1, 2 * BLOCK] {
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
