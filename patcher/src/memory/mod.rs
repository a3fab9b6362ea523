//! [`PatchMemory`]: allocates the guest memory that patches use.
//!
//! All of it is in [hidden windows](hidden_window): *hidden* memory is memory that the guest's
//! memory map does not name. Code, constants and data have windows of their own, with the rights
//! that they need and no more. The padding of the kernel's text is not used: the kernel takes what
//! is there for its own text, and never asks the tables in which a patch is
//! [registered](crate::registration). Nothing here changes what the guest sees: the writes are
//! planned here, those of the page table entries that map a hidden window included, and committed
//! in a pause by [`Patcher`](crate::patcher).

pub mod error;
pub mod grace_period;
pub mod hidden_window;
pub mod range_alloc;
pub mod write_batch;

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, GvaRange, Kernel};

use crate::error::PatchError;
use crate::error::StepError;
use crate::machine::Machine;
use crate::memory::error::PatchMemoryError;
use crate::memory::grace_period::{GracePeriod, Quarantine};
pub use crate::memory::hidden_window::Usage;
use crate::memory::hidden_window::{HiddenWindow, WINDOW_SIZE};
use crate::memory::write_batch::WriteBatch;
use crate::x86::INT3;

/// The most hidden windows that one guest is given.
const MAX_WINDOWS: usize = 16;

/// A request for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Length in bytes.
    pub len: u64,
    /// Alignment in bytes; a power of two.
    pub align: u64,
}

/// A range of the guest's address space that was allocated for a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Its addresses.
    pub range: GvaRange,
    /// The hidden window that it is in, by index.
    hidden_window: usize,
}

impl Allocation {
    #[cfg(test)]
    pub(crate) fn made_up(start: Gva, len: u64) -> Allocation {
        Allocation {
            range: GvaRange::new(start, start.add(len)),
            hidden_window: 0,
        }
    }
}

/// The memory of one guest that patches use, and what of it is allocated.
#[derive(Clone, Debug, Default)]
pub struct PatchMemory {
    hidden_windows: Vec<HiddenWindow>,
    quarantine: Quarantine,
}

impl PatchMemory {
    /// Allocates memory for `usage`. It may hold what an earlier owner left: the caller writes all
    /// of it before the guest can see it. `fixmap_table` is `level2_fixmap_pgt`.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn allocate<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        fixmap_table: Gva,
        usage: Usage,
        request: Request,
    ) -> Result<Allocation, PatchError> {
        if request.len > WINDOW_SIZE {
            return Err(PatchMemoryError::TooLarge {
                bytes: request.len,
                max: WINDOW_SIZE,
            }
            .into());
        }
        for (at, window) in self.hidden_windows.iter_mut().enumerate() {
            if window.usage != usage {
                continue;
            }
            if let Some(range) = window.allocator.allocate(request.len, request.align) {
                return Ok(Allocation {
                    range,
                    hidden_window: at,
                });
            }
        }
        let mut window = self.new_window(machine, kernel, fixmap_table, usage)?;
        let range = window.allocator.allocate(request.len, request.align);
        self.hidden_windows.push(window);
        range
            .map(|range| Allocation {
                range,
                hidden_window: self.hidden_windows.len() - 1,
            })
            .ok_or_else(|| {
                PatchMemoryError::AlignmentTooLarge {
                    align: request.align,
                    max: WINDOW_SIZE,
                }
                .into()
            })
    }

    fn new_window<M: Machine>(
        &self,
        machine: &mut M,
        kernel: &Kernel,
        fixmap_table: Gva,
        usage: Usage,
    ) -> Result<HiddenWindow, PatchError> {
        if self.hidden_windows.len() >= MAX_WINDOWS {
            return Err(PatchMemoryError::NoHiddenWindow { max: MAX_WINDOWS }.into());
        }
        let used: Vec<Gva> = self
            .hidden_windows
            .iter()
            .map(|window| window.entry)
            .collect();
        let gpa = machine.add_hidden_memory(WINDOW_SIZE)?;
        let memory = kernel.memory(machine.memory());
        let chosen = HiddenWindow::choose(&memory, fixmap_table, usage, gpa, &used);
        let failure = match chosen {
            Ok(Some(window)) => return Ok(window),
            Ok(None) => PatchMemoryError::NoEntry.into(),
            Err(error) => error.into(),
        };
        machine.remove_hidden_memory(gpa)?;
        Err(failure)
    }

    /// Frees an allocation. The caller has already restored what the guest can see of it.
    pub fn free(&mut self, allocation: Allocation) {
        if let Some(window) = self.hidden_windows.get_mut(allocation.hidden_window) {
            window.allocator.free(allocation.range);
        }
    }

    /// Frees an allocation that readers in the guest may still read until `grace_period` has
    /// passed.
    pub fn free_after(&mut self, allocation: Allocation, grace_period: GracePeriod) {
        self.quarantine.add(allocation, grace_period);
    }

    /// Frees what no reader in the guest can read any more. `now` is `rcu_state.gp_seq`.
    pub fn reclaim(&mut self, now: u64) {
        for allocation in self.quarantine.take_free(now) {
            self.free(allocation);
        }
    }

    /// The error to report for `error`, if that is a lack of memory of which some will be free:
    /// `now` is `rcu_state.gp_seq`.
    pub fn explain(&self, error: PatchError, now: u64) -> PatchError {
        match (&error, self.quarantine.waiting()) {
            (PatchError::Memory(PatchMemoryError::NoHiddenWindow { .. }), Some((bytes, until))) => {
                PatchMemoryError::Quarantined { bytes, until, now }.into()
            }
            _ => error,
        }
    }

    /// Plans a write of `bytes` at the start of `allocation`, whether or not the guest maps that
    /// yet.
    pub fn plan_fill(&self, allocation: Allocation, bytes: &[u8], writes: &mut WriteBatch) {
        self.plan_part(allocation, allocation.range.start, bytes, writes);
    }

    /// Plans a write of `bytes` at `at` in `allocation`, whether or not the guest maps that yet.
    pub fn plan_part(
        &self,
        allocation: Allocation,
        at: Gva,
        bytes: &[u8],
        writes: &mut WriteBatch,
    ) {
        if let Some(window) = self.hidden_windows.get(allocation.hidden_window) {
            writes.write(window.gpa_of(at), bytes);
        }
    }

    /// Plans a write of `bytes` at `at`: in a hidden window, whether or not the guest maps that yet,
    /// or anywhere else in kernel memory.
    ///
    /// # Errors
    /// [`ReadError`] when it is in no hidden window and not mapped.
    pub fn plan_anywhere(
        &self,
        memory: &KernelMemory<'_>,
        at: Gva,
        bytes: &[u8],
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        let mut windows = self.hidden_windows.iter();
        match windows.find(|window| window.allocator.range().contains(at)) {
            Some(window) => writes.write(window.gpa_of(at), bytes),
            None => writes.write_kernel(memory, at, bytes)?,
        }
        Ok(())
    }

    /// Plans the writes that fill `allocation` with INT3.
    pub fn plan_clear(&self, allocation: Allocation, writes: &mut WriteBatch) {
        let filler = vec![INT3; usize::try_from(allocation.range.len()).unwrap_or_default()];
        self.plan_fill(allocation, &filler, writes);
    }

    /// Checks, in a pause and before anything is written, that the page table entries of all hidden
    /// windows are as they were left.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn check(&self, memory: &KernelMemory<'_>) -> Result<(), StepError> {
        for window in &self.hidden_windows {
            if !window.is_unchanged(memory)? {
                return Err(PatchMemoryError::EntryTaken(window.entry).into());
            }
        }
        Ok(())
    }

    /// Plans the mapping of every hidden window that the guest does not map yet.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan_mapping(
        &self,
        memory: &KernelMemory<'_>,
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        (self.hidden_windows.iter()).try_for_each(|window| window.plan_mapping(memory, writes))
    }

    /// Checks that the guest's page tables lead to every hidden window, once the mapping is
    /// written.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn check_mapping(&self, memory: &KernelMemory<'_>) -> Result<(), PatchError> {
        match self
            .hidden_windows
            .iter()
            .find(|window| !window.is_mapped(memory))
        {
            None => Ok(()),
            Some(window) => Err(PatchMemoryError::NotMapped(window.allocator.range().start).into()),
        }
    }

    /// Records that every hidden window is mapped, permanently.
    pub fn mapped(&mut self) {
        for window in &mut self.hidden_windows {
            window.mapped = true;
        }
    }
}
