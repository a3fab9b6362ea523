//! A guest out of a core file, in memory, that does not run and can be changed: what a patch does to a guest, with nothing of the
//! guest's own doing in between. It counts what is asked of it, and fails where it is told to.

use std::{collections::BTreeMap, fmt, sync::Arc};

use anyhow::Result;
use introspect::{CoreFile, PhysMemory, VcpuRegs};
use patcher::{Machine, MachineError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// Memory is copied so many bytes at a time.
const CHUNK: usize = 64 << 10;
/// Originals are kept in pages.
const PAGE: u64 = 4096;
/// Hidden memory lies at a multiple of this.
const ALIGN: u64 = 2 << 20;

/// What a guest does between two looks; given its memory.
type OnPause = Box<dyn FnMut(&GuestMemoryMmap)>;

/// The guest.
pub struct CoreMachine {
    memory: GuestMemoryMmap,
    vcpus: Vec<VcpuRegs>,
    /// Where hidden memory begins.
    hidden: u64,
    /// What stood in each page of RAM before it was first written.
    originals: BTreeMap<u64, Vec<u8>>,
    paused: u32,
    steps: u64,
    fail_at: Option<u64>,
    failed: Option<&'static str>,
    on_pause: Option<OnPause>,
}

impl fmt::Debug for CoreMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreMachine")
            .field("steps", &self.steps)
            .field("fail_at", &self.fail_at)
            .finish_non_exhaustive()
    }
}

impl CoreMachine {
    /// As much of the core's memory as is not zero, in a mapping of its own.
    ///
    /// # Errors
    /// When it cannot be read, or there is no room for it.
    pub fn load(core: &CoreFile) -> Result<CoreMachine> {
        let memory = map(core)?;
        let hidden = memory.last_addr().0.next_multiple_of(ALIGN);
        Ok(CoreMachine {
            memory,
            vcpus: core.vcpus().to_vec(),
            hidden,
            originals: BTreeMap::new(),
            paused: 0,
            steps: 0,
            fail_at: None,
            failed: None,
            on_pause: None,
        })
    }

    /// What happens in the guest right before each pause.
    pub fn on_pause(&mut self, change: impl FnMut(&GuestMemoryMmap) + 'static) {
        self.on_pause = Some(Box::new(change));
    }

    /// From now on, the step with this number fails, counted from 0.
    pub fn fail_at(&mut self, step: Option<u64>) {
        self.steps = 0;
        self.fail_at = step;
        self.failed = None;
    }

    /// Which call was made to fail, if any was yet.
    #[must_use]
    pub fn failed(&self) -> Option<&'static str> {
        self.failed
    }

    /// How many steps were asked for since [`fail_at`](Self::fail_at).
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// All RAM that was ever written, as it is now: by page.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn written(&self) -> Result<BTreeMap<u64, Vec<u8>>> {
        let mut pages = BTreeMap::new();
        for at in self.originals.keys() {
            pages.insert(*at, self.page(*at)?);
        }
        Ok(pages)
    }

    /// Where RAM now differs from what it was at `before`: from the first byte to the last of each page that does.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn changes_since(&self, before: &BTreeMap<u64, Vec<u8>>) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut changes = Vec::new();
        for (at, original) in &self.originals {
            let (then, now) = (before.get(at).unwrap_or(original), self.page(*at)?);
            let differs = |place: &usize| then.get(*place) != now.get(*place);
            let first = (0..now.len()).find(differs);
            let last = (0..now.len()).rev().find(differs);
            if let (Some(first), Some(last)) = (first, last) {
                changes.push((at + first as u64, now[first..=last].to_vec()));
            }
        }
        Ok(changes)
    }

    /// Puts all RAM back as it was in the core, and gives hidden memory back.
    ///
    /// # Errors
    /// When a page cannot be written.
    pub fn restore(&mut self) -> Result<()> {
        for (at, original) in std::mem::take(&mut self.originals) {
            self.memory.write_slice(&original, GuestAddress(at))?;
        }
        let hidden: Vec<_> = (self.memory.iter())
            .map(|region| (region.start_addr(), region.len()))
            .filter(|(start, _)| start.0 >= self.hidden)
            .collect();
        for (start, len) in hidden {
            self.memory = self.memory.remove_region(start, len)?.0;
        }
        self.paused = 0;
        self.fail_at(None);
        Ok(())
    }

    /// Whether all vCPUs would run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.paused == 0
    }

    fn page(&self, at: u64) -> Result<Vec<u8>> {
        let mut page = vec![0; usize::try_from(PAGE)?];
        self.memory.read_slice(&mut page, GuestAddress(at))?;
        Ok(page)
    }

    fn step(
        &mut self,
        call: &'static str,
        error: impl FnOnce(String) -> MachineError,
    ) -> Result<(), MachineError> {
        let step = self.steps;
        self.steps += 1;
        match self.fail_at {
            Some(failing) if failing == step => {
                self.failed = Some(call);
                Err(error("made to fail".into()))
            }
            _ => Ok(()),
        }
    }

    fn keep_originals(&mut self, gpa: u64, len: u64) {
        let first = gpa / PAGE * PAGE;
        for at in (first..gpa.saturating_add(len)).step_by(4096) {
            if at < self.hidden
                && !self.originals.contains_key(&at)
                && let Ok(page) = self.page(at)
            {
                self.originals.insert(at, page);
            }
        }
    }
}

/// As much of a core's memory as is not zero, in a mapping as the VMM's own guests have.
///
/// # Errors
/// When it cannot be read, or there is no room for it.
pub fn map(core: &CoreFile) -> Result<GuestMemoryMmap> {
    let ranges: Vec<(GuestAddress, usize)> = core
        .ranges()
        .map(|(start, len)| Ok((start, usize::try_from(len)?)))
        .collect::<Result<_>>()?;
    let mapped = GuestMemoryMmap::from_ranges(&ranges)?;
    vmm::slots::prefer_large_pages(&mapped);
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
        self.step("pause", MachineError::Vcpu)?;
        if let Some(change) = &mut self.on_pause {
            change(&self.memory);
        }
        self.paused += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.paused = self.paused.saturating_sub(1);
        self.step("resume", MachineError::Vcpu)
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.step("vcpus", MachineError::Vcpu)?;
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let missed = MachineError::Memory {
            gpa,
            len: bytes.len(),
        };
        self.step("write", |_| missed.clone())?;
        if self.paused == 0 && gpa.0 < self.hidden {
            return Err(MachineError::Vcpu("a write while the guest runs".into()));
        }
        self.keep_originals(gpa.0, bytes.len() as u64);
        self.memory.write_slice(bytes, gpa).map_err(|_| missed)
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        self.step("add_hidden_memory", MachineError::HiddenMemory)?;
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
        self.step("remove_hidden_memory", MachineError::HiddenMemory)?;
        let missing = || MachineError::HiddenMemory(format!("none at {:#x}", gpa.0));
        let region = self.memory.find_region(gpa).ok_or_else(missing)?;
        let len = region.len();
        let without = self.memory.remove_region(gpa, len);
        self.memory = without.map_err(|_| missing())?.0;
        Ok(())
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        self.step("interrupt", MachineError::Interrupt)
    }
}
