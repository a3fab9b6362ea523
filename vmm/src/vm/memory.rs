//! Guest-physical memory: the guest's RAM, and hidden memory that its memory map never lists.
//!
//! This module knows which host mapping backs which guest-physical range; it must not know what the
//! guest keeps there. The RAM's mappings never change after the guest is built, so reading RAM
//! takes no lock. Hidden memory is added and removed at run time, and all clones see the same.

use std::sync::{Arc, PoisonError, RwLock};

use introspect::memory::FieldRange;
use introspect::{OutOfBounds, PhysMemory};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// The guest-physical memory of one VM. Clones share it.
#[derive(Clone, Debug)]
pub struct VmMemory {
    ram: GuestMemoryMmap,
    hidden: Arc<RwLock<GuestMemoryMmap>>,
}

impl VmMemory {
    /// The memory of a guest that has `ram` and no hidden memory yet.
    #[must_use]
    pub fn new(ram: GuestMemoryMmap) -> VmMemory {
        VmMemory {
            ram,
            hidden: Arc::default(),
        }
    }

    /// The RAM: what the guest's memory map lists.
    #[must_use]
    pub fn ram(&self) -> &GuestMemoryMmap {
        &self.ram
    }

    /// Writes all of `bytes`, or nothing.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not all RAM or all hidden memory.
    pub fn write(&self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let outside = OutOfBounds {
            gpa,
            len: bytes.len(),
        };
        let hidden;
        let backing = if GuestMemoryBackend::check_range(&self.ram, gpa, bytes.len()) {
            &self.ram
        } else {
            hidden = self.hidden.read().unwrap_or_else(PoisonError::into_inner);
            if !GuestMemoryBackend::check_range(&*hidden, gpa, bytes.len()) {
                return Err(outside);
            }
            &*hidden
        };
        backing.write_slice(bytes, gpa).map_err(|_| outside)
    }

    /// Start and length in bytes of each range of RAM and hidden memory, in order of address.
    #[must_use]
    pub fn ranges(&self) -> Vec<(GuestAddress, u64)> {
        let hidden = self.hidden.read().unwrap_or_else(PoisonError::into_inner);
        let regions = self.ram.iter().chain(hidden.iter());
        let mut ranges: Vec<_> = regions
            .map(|region| (region.start_addr(), region.len()))
            .collect();
        ranges.sort_unstable();
        ranges
    }

    /// Adds `region` to the hidden memory. False: it overlaps other hidden memory and is not added.
    pub(crate) fn insert_hidden(&self, region: Arc<GuestRegionMmap>) -> bool {
        let mut hidden = self.hidden.write().unwrap_or_else(PoisonError::into_inner);
        match hidden.insert_region(region) {
            Ok(grown) => {
                *hidden = grown;
                true
            }
            Err(_) => false,
        }
    }

    /// Removes the hidden region of `len` bytes at `gpa`.
    pub(crate) fn remove_hidden(&self, gpa: GuestAddress, len: u64) {
        let mut hidden = self.hidden.write().unwrap_or_else(PoisonError::into_inner);
        if let Ok((rest, _)) = hidden.remove_region(gpa, len) {
            *hidden = rest;
        }
    }
}

impl PhysMemory for VmMemory {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        if PhysMemory::read(&self.ram, gpa, buf).is_ok() {
            return Ok(());
        }
        let len = buf.len();
        self.hidden
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .read_slice(buf, gpa)
            .map_err(|_| OutOfBounds { gpa, len })
    }

    fn read_fields(
        &self,
        gpa: GuestAddress,
        parts: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        // Records of the guest's kernel are in its RAM, never in hidden memory.
        self.ram.read_fields(gpa, parts, buf)
    }

    fn compare(
        &self,
        gpas: &[GuestAddress],
        parts: &[FieldRange],
        bytes: &[u8],
        same: &mut [bool],
    ) {
        self.ram.compare(gpas, parts, bytes, same);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> VmMemory {
        VmMemory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap())
    }

    #[test]
    fn a_write_that_misses_writes_nothing() {
        let memory = memory();
        assert!(memory.write(GuestAddress(0x1ffc), &[1; 8]).is_err());
        let mut tail = [9; 4];
        memory.read(GuestAddress(0x1ffc), &mut tail).unwrap();
        assert_eq!(tail, [0; 4]);
    }

    #[test]
    fn gathered_is_as_read() {
        let memory = memory();
        let bytes: Vec<u8> = (0..0x2000).map(|at| (at % 251) as u8).collect();
        memory.write(GuestAddress(0), &bytes).unwrap();
        let parts = [(0, 8), (20, 36), (0x880, 1), (0x1ff8, 8)]
            .map(|(offset, len)| FieldRange { offset, len });
        for base in [0, 5, 8, 0x1000] {
            let mut got = [0; 53];
            let done = memory.read_fields(GuestAddress(base), &parts, &mut got);
            let mut wanted = Vec::new();
            let all = parts.iter().all(|part| {
                let mut one = vec![0; part.len];
                let read = memory.read(GuestAddress(base + part.offset), &mut one);
                wanted.append(&mut one);
                read.is_ok()
            });
            assert_eq!(done.is_ok(), all, "{base:#x}");
            assert!(!all || got[..] == wanted[..], "{base:#x}");
        }
    }

    #[test]
    fn hidden_memory_is_seen_by_every_clone_until_removed() {
        let memory = memory();
        let clone = memory.clone();
        let gpa = GuestAddress(1 << 32);
        let region = || Arc::new(GuestRegionMmap::from_range(gpa, 0x1000, None).unwrap());
        assert!(memory.insert_hidden(region()));
        assert!(!memory.insert_hidden(region()), "overlap");
        clone.write(GuestAddress(gpa.0 + 8), b"hidden").unwrap();
        let mut back = [0; 6];
        memory.read(GuestAddress(gpa.0 + 8), &mut back).unwrap();
        assert_eq!(&back, b"hidden");
        memory.remove_hidden(gpa, 0x1000);
        assert!(clone.read(gpa, &mut back).is_err());
        assert!(clone.write(gpa, b"x").is_err());
    }
}
