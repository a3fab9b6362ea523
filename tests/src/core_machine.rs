//! A guest from a core file, in memory, that can be written and in which nothing runs: it shows
//! what a patch changes in a guest, without changes that the guest makes itself.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use introspect::{CoreFile, PhysMemory, VcpuRegs};
use patcher::{Machine, MachineError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

/// How many bytes of memory are copied at a time.
const CHUNK: usize = 64 << 10;
/// The unit of memory in which changes are reported, in bytes.
const PAGE: u64 = 4096;
/// The alignment of hidden memory, in bytes.
const ALIGN: u64 = 2 << 20;

/// What the guest changes between two pauses, given its memory.
type OnPause = Box<dyn FnMut(&GuestMemoryMmap)>;

/// The guest as a machine.
pub struct CoreMachine {
    memory: GuestMemoryMmap,
    vcpus: Vec<VcpuRegs>,
    /// The address at which hidden memory begins.
    hidden: u64,
    /// Each write to RAM, split at page boundaries: its address, and the range of `before` with the
    /// previous content. Pages are put together on request only, as the duration of a pause is
    /// measured.
    writes: Vec<(u64, Range<usize>)>,
    before: Vec<u8>,
    /// How many pauses were not resumed yet.
    paused: u32,
    on_pause: Option<OnPause>,
}

impl fmt::Debug for CoreMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreMachine").finish_non_exhaustive()
    }
}

impl CoreMachine {
    /// Copies the core file's memory into a new mapping.
    ///
    /// # Errors
    /// When it cannot be read or mapped.
    pub fn load(core: &CoreFile) -> Result<CoreMachine> {
        let memory = map(core)?;
        let hidden = memory.last_addr().0.next_multiple_of(ALIGN);
        Ok(CoreMachine {
            memory,
            vcpus: core.vcpus().to_vec(),
            hidden,
            writes: Vec::new(),
            before: Vec::new(),
            paused: 0,
            on_pause: None,
        })
    }

    /// Sets what changes in the guest right before each pause.
    pub fn on_pause(&mut self, change: impl FnMut(&GuestMemoryMmap) + 'static) {
        self.on_pause = Some(Box::new(change));
    }

    /// All pages of RAM that were ever written, as they are now, by address.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn written(&self) -> Result<BTreeMap<u64, Vec<u8>>> {
        let mut pages = BTreeMap::new();
        for (gpa, _) in &self.writes {
            let at = gpa / PAGE * PAGE;
            if let Entry::Vacant(page) = pages.entry(at) {
                let page = page.insert(vec![0; usize::try_from(PAGE)?]);
                self.memory.read_slice(page, GuestAddress(at))?;
            }
        }
        Ok(pages)
    }

    /// The differences between RAM now and at `before`, which [`written`](Self::written) returned:
    /// for each page, the address of the first byte that differs, and all bytes from it to the
    /// last.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn changes_since(&self, before: &BTreeMap<u64, Vec<u8>>) -> Result<Vec<(u64, Vec<u8>)>> {
        let now = self.written()?;
        let mut original = now.clone();
        for (gpa, old) in self.writes.iter().rev() {
            let old = &self.before[old.clone()];
            let into = usize::try_from(gpa % PAGE)?;
            if let Some(page) = original.get_mut(&(gpa - gpa % PAGE)) {
                page[into..into + old.len()].copy_from_slice(old);
            }
        }
        let mut changes = Vec::new();
        for (at, now) in now {
            let then = before.get(&at).or(original.get(&at));
            let then = then.context("no such page")?;
            let differs = |place: &usize| then.get(*place) != now.get(*place);
            let first = (0..now.len()).find(differs);
            let last = (0..now.len()).rev().find(differs);
            if let (Some(first), Some(last)) = (first, last) {
                changes.push((at + first as u64, now[first..=last].to_vec()));
            }
        }
        Ok(changes)
    }

    /// Restores RAM as it is in the core file, and removes hidden memory.
    ///
    /// # Errors
    /// When a page cannot be written.
    pub fn restore(&mut self) -> Result<()> {
        for (gpa, old) in self.writes.drain(..).rev() {
            self.memory
                .write_slice(&self.before[old], GuestAddress(gpa))?;
        }
        self.before.clear();
        let hidden: Vec<_> = (self.memory.iter())
            .map(|region| (region.start_addr(), region.len()))
            .filter(|(start, _)| start.0 >= self.hidden)
            .collect();
        for (start, len) in hidden {
            self.memory = self.memory.remove_region(start, len)?.0;
        }
        self.paused = 0;
        Ok(())
    }

    /// Whether the vCPUs would run, as each pause was resumed.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.paused == 0
    }

    /// Records the content of RAM at `gpa` before it is overwritten.
    fn keep_before(&mut self, gpa: GuestAddress, len: usize) -> Result<(), GuestMemoryError> {
        let start = self.before.len();
        self.before.resize(start + len, 0);
        let read = (self.memory).read_slice(&mut self.before[start..], gpa);
        if read.is_err() || gpa.0 >= self.hidden {
            self.before.truncate(start);
            return read;
        }
        let (mut at, end) = (gpa.0, gpa.0 + len as u64);
        while at < end {
            let next = end.min(at / PAGE * PAGE + PAGE);
            let place = |to: u64| start + usize::try_from(to - gpa.0).unwrap_or(len);
            self.writes.push((at, place(at)..place(next)));
            at = next;
        }
        Ok(())
    }
}

/// Copies a core file's memory into a mapping like those of the VMM's own guests. Zeros are not
/// copied.
///
/// # Errors
/// When it cannot be read or mapped.
pub fn map(core: &CoreFile) -> Result<GuestMemoryMmap> {
    let ranges: Vec<(GuestAddress, usize)> = core
        .ranges()
        .map(|(start, len)| Ok((start, usize::try_from(len)?)))
        .collect::<Result<_>>()?;
    let mapped = GuestMemoryMmap::from_ranges(&ranges)?;
    vmm::prefer_large_pages(&mapped);
    let mut chunk = vec![0; CHUNK];
    for (start, len) in core.ranges() {
        for done in (0..len).step_by(CHUNK) {
            let at = GuestAddress(start.0 + done);
            let part = chunk.len().min(usize::try_from(len - done)?);
            let bytes = &mut chunk[..part];
            core.read(at, bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                mapped.write_slice(bytes, at)?;
            }
        }
    }
    Ok(mapped)
}

impl Machine for CoreMachine {
    type Memory = GuestMemoryMmap;

    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        if let Some(change) = &mut self.on_pause {
            change(&self.memory);
        }
        self.paused += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.paused = self.paused.saturating_sub(1);
        Ok(())
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let missed = MachineError::Memory {
            gpa,
            len: bytes.len(),
        };
        if self.paused == 0 && gpa.0 < self.hidden {
            return Err(MachineError::Vcpu("a write while the guest runs".into()));
        }
        self.keep_before(gpa, bytes.len())
            .and_then(|()| self.memory.write_slice(bytes, gpa))
            .map_err(|_| missed)
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        let refused = |error: &dyn std::fmt::Display| MachineError::HiddenMemory(error.to_string());
        let end = self.memory.last_addr().0.saturating_add(1);
        let at = GuestAddress(end.max(self.hidden).next_multiple_of(ALIGN));
        let size = usize::try_from(len).map_err(|error| refused(&error))?;
        let region = MmapRegion::new(size).map_err(|error| refused(&error))?;
        let region = GuestRegionMmap::new(region, at)
            .ok_or_else(|| MachineError::HiddenMemory("no address".into()))?;
        let with = self.memory.insert_region(Arc::new(region));
        self.memory = with.map_err(|error| refused(&error))?;
        Ok(at)
    }

    fn remove_hidden_memory(&mut self, gpa: GuestAddress) -> Result<(), MachineError> {
        let missing = || MachineError::HiddenMemory(format!("none at {:#x}", gpa.0));
        let region = self.memory.find_region(gpa).ok_or_else(missing)?;
        let len = region.len();
        let without = self.memory.remove_region(gpa, len);
        self.memory = without.map_err(|_| missing())?.0;
        Ok(())
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Ok(())
    }
}
