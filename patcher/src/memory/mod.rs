//! [`PatchMemory`]: allocates the guest memory that patches use.
//!
//! Code goes into the [`cave`], or into a [hidden window](hidden_window) when the kernel's text has
//! no cave or the cave has no room left. Data goes into a hidden window, and so does the dummy
//! patch to which the kernel's `klp_transition_patch` points. *Hidden* memory is memory that the
//! guest's memory map does not name. Nothing here changes what the guest sees: the writes are
//! planned here, those of the page table entries that map a hidden window included, and committed
//! in a pause by [`Patcher`](crate::patcher).

pub mod cave;
pub mod error;
pub mod hidden_window;
pub mod range_alloc;
pub mod write_batch;

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, GvaRange, Kernel};

use crate::error::PatchError;
use crate::error::StepError;
use crate::machine::Machine;
use crate::memory::cave::TextMap;
use crate::memory::error::PatchMemoryError;
use crate::memory::hidden_window::{HiddenWindow, Usage, WINDOW_SIZE};
use crate::memory::range_alloc::RangeAllocator;
use crate::memory::write_batch::WriteBatch;
use crate::x86::INT3;

/// The most hidden windows that one guest is given.
const MAX_WINDOWS: usize = 16;

/// The parts of a guest's kernel that decide where patches can go.
#[derive(Clone, Debug)]
pub struct PatchAreas {
    /// The kernel's text, whose padding can hold code.
    pub text: TextMap,
    /// `level2_fixmap_pgt`, the page table that maps hidden windows.
    pub fixmap_table: Gva,
}

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
    /// The hidden window that it is in, by index; `None`: it is in the cave.
    hidden_window: Option<usize>,
}

impl Allocation {
    #[cfg(test)]
    pub(crate) fn made_up(start: Gva, len: u64) -> Allocation {
        Allocation {
            range: GvaRange::new(start, start.add(len)),
            hidden_window: None,
        }
    }

    /// Whether it is in the padding of the kernel's own text, and not in hidden memory.
    #[must_use]
    pub fn is_in_cave(&self) -> bool {
        self.hidden_window.is_none()
    }
}

/// The memory of one guest that patches use, and what of it is allocated.
#[derive(Clone, Debug, Default)]
pub struct PatchMemory {
    /// The cave: `None` until it was searched for, `Some(None)` when the kernel has none.
    cave: Option<Option<RangeAllocator>>,
    hidden_windows: Vec<HiddenWindow>,
}

impl PatchMemory {
    /// Allocates memory for code.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn allocate_code<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
        request: Request,
    ) -> Result<Allocation, PatchError> {
        if self.cave.is_none() {
            let memory = kernel.memory(machine.memory());
            self.cave = Some(cave::find(&memory, &areas.text)?.map(RangeAllocator::new));
        }
        let in_cave = (self.cave.as_mut())
            .and_then(Option::as_mut)
            .and_then(|cave| cave.allocate(request.len, request.align));
        match in_cave {
            Some(range) => Ok(Allocation {
                range,
                hidden_window: None,
            }),
            None => self.allocate_hidden(machine, kernel, areas, Usage::Code, request),
        }
    }

    /// Allocates memory for data. It may hold what an earlier owner left: the caller writes all of
    /// it before the guest can see it.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn allocate_data<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
        request: Request,
    ) -> Result<Allocation, PatchError> {
        self.allocate_hidden(machine, kernel, areas, Usage::Data, request)
    }

    fn allocate_hidden<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
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
                    hidden_window: Some(at),
                });
            }
        }
        let mut window = self.new_window(machine, kernel, areas, usage)?;
        let range = window.allocator.allocate(request.len, request.align);
        self.hidden_windows.push(window);
        range
            .map(|range| Allocation {
                range,
                hidden_window: Some(self.hidden_windows.len() - 1),
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
        areas: &PatchAreas,
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
        let chosen = HiddenWindow::choose(&memory, areas.fixmap_table, usage, gpa, &used);
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
        let allocator = match allocation.hidden_window {
            None => self.cave.as_mut().and_then(Option::as_mut),
            Some(at) => self
                .hidden_windows
                .get_mut(at)
                .map(|window| &mut window.allocator),
        };
        if let Some(allocator) = allocator {
            allocator.free(allocation.range);
        }
    }

    /// Plans a write of `bytes` at `at` in an allocation in a hidden window, whether or not the
    /// guest maps that yet. For an allocation in the cave it plans nothing and returns `false`.
    pub fn plan_hidden(
        &self,
        allocation: Allocation,
        at: Gva,
        bytes: &[u8],
        writes: &mut WriteBatch,
    ) -> bool {
        let window = allocation
            .hidden_window
            .and_then(|at| self.hidden_windows.get(at));
        if let Some(window) = window {
            writes.write(window.gpa_of(at), bytes);
        }
        window.is_some()
    }

    /// Plans a write of `bytes` at the start of `allocation`.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_fill(
        &self,
        memory: &KernelMemory<'_>,
        allocation: Allocation,
        bytes: &[u8],
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        self.plan_part(memory, allocation, allocation.range.start, bytes, writes)
    }

    /// Plans a write of `bytes` at `at` in `allocation`.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_part(
        &self,
        memory: &KernelMemory<'_>,
        allocation: Allocation,
        at: Gva,
        bytes: &[u8],
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        if self.plan_hidden(allocation, at, bytes, writes) {
            return Ok(());
        }
        writes.write_kernel(memory, at, bytes)
    }

    /// Plans the writes that fill `allocation` with INT3, as it was before it was allocated.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_clear(
        &self,
        memory: &KernelMemory<'_>,
        allocation: Allocation,
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        let filler = vec![INT3; usize::try_from(allocation.range.len()).unwrap_or_default()];
        self.plan_fill(memory, allocation, &filler, writes)
    }

    /// Checks, in a pause and before anything is written, that the page table entries of all hidden
    /// windows are as they were left, and that `code`, if it is in the cave, is still padding.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn check(&self, memory: &KernelMemory<'_>, code: Allocation) -> Result<(), StepError> {
        for window in &self.hidden_windows {
            if !window.is_unchanged(memory)? {
                return Err(PatchMemoryError::EntryTaken(window.entry).into());
            }
        }
        if code.hidden_window.is_none() && !cave::is_filler(memory, code.range)? {
            return Err(PatchMemoryError::PaddingTaken(code.range.start).into());
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
