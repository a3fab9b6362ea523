//! Where a patch lies in the guest, and what place is left for others.
//!
//! Puts [`cave`](crate::memory::cave) and [`window`](crate::memory::hidden_window) together: code goes into the cave, or into a hidden window where the
//! kernel has none; data, and the stand-in for the kernel's own `klp_transition_patch`, into a hidden window. Nothing here
//! touches what the guest sees: that is planned here and carried out by the transition.

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
use crate::memory::hidden_window::{HiddenWindow, Usage, WINDOW};
use crate::memory::range_alloc::RangeAllocator;
use crate::memory::write_batch::WriteBatch;
use crate::x86::INT3;

/// More hidden memory than this many windows is not given to one guest.
const MAX_WINDOWS: usize = 16;

/// Where a guest's kernel leaves room for patches.
#[derive(Clone, Debug)]
pub struct PatchAreas {
    /// The kernel's text, whose padding takes code.
    pub text: TextMap,
    /// `level2_fixmap_pgt`, the page table that maps hidden windows.
    pub fixmap_table: Gva,
}

/// How much room a patch needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bytes.
    pub len: u64,
    /// A power of two.
    pub align: u64,
}

/// A piece of the guest that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Where.
    pub range: GvaRange,
    /// In which window; `None`: in the cave.
    window: Option<usize>,
}

impl Allocation {
    #[cfg(test)]
    pub(crate) fn made_up(start: Gva, len: u64) -> Allocation {
        Allocation {
            range: GvaRange::new(start, start.add(len)),
            window: None,
        }
    }

    /// Whether it is in the padding of the kernel's own text, and not in hidden memory.
    #[must_use]
    pub fn is_in_cave(&self) -> bool {
        self.window.is_none()
    }
}

/// All places in one guest.
#[derive(Clone, Debug, Default)]
pub struct PatchMemory {
    /// The cave, once looked for.
    cave: Option<Option<RangeAllocator>>,
    windows: Vec<HiddenWindow>,
}

impl PatchMemory {
    /// Takes room for code.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn take_code<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        if self.cave.is_none() {
            let memory = kernel.memory(machine.memory());
            self.cave = Some(cave::find(&memory, &areas.text)?.map(RangeAllocator::new));
        }
        let in_cave = (self.cave.as_mut())
            .and_then(Option::as_mut)
            .and_then(|room| room.take(need.len, need.align));
        match in_cave {
            Some(range) => Ok(Allocation {
                range,
                window: None,
            }),
            None => self.take_hidden(machine, kernel, areas, Usage::Code, need),
        }
    }

    /// Takes room for data. The piece is zeroed before the guest can see it only if its owner writes it whole.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn take_data<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        self.take_hidden(machine, kernel, areas, Usage::Data, need)
    }

    fn take_hidden<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        areas: &PatchAreas,
        usage: Usage,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        if need.len > WINDOW {
            return Err(PatchMemoryError::TooLarge {
                bytes: need.len,
                max: WINDOW,
            }
            .into());
        }
        for (at, window) in self.windows.iter_mut().enumerate() {
            if window.usage != usage {
                continue;
            }
            if let Some(range) = window.room.take(need.len, need.align) {
                return Ok(Allocation {
                    range,
                    window: Some(at),
                });
            }
        }
        let mut window = self.new_window(machine, kernel, areas, usage)?;
        let range = window.room.take(need.len, need.align);
        self.windows.push(window);
        range
            .map(|range| Allocation {
                range,
                window: Some(self.windows.len() - 1),
            })
            .ok_or_else(|| {
                PatchMemoryError::TooLarge {
                    bytes: need.align,
                    max: WINDOW,
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
        if self.windows.len() >= MAX_WINDOWS {
            return Err(PatchMemoryError::NoWindow { max: MAX_WINDOWS }.into());
        }
        let taken: Vec<Gva> = self.windows.iter().map(|window| window.entry).collect();
        let gpa = machine.add_hidden_memory(WINDOW)?;
        let memory = kernel.memory(machine.memory());
        let chosen = HiddenWindow::choose(&memory, areas.fixmap_table, usage, gpa, &taken);
        let failure = match chosen {
            Ok(Some(window)) => return Ok(window),
            Ok(None) => PatchMemoryError::NoEntry.into(),
            Err(error) => error.into(),
        };
        machine.remove_hidden_memory(gpa)?;
        Err(failure)
    }

    /// Gives a piece back. What the guest can see of it has been put back before.
    pub fn free(&mut self, piece: Allocation) {
        let room = match piece.window {
            None => self.cave.as_mut().and_then(Option::as_mut),
            Some(at) => self.windows.get_mut(at).map(|window| &mut window.room),
        };
        if let Some(room) = room {
            room.free(piece.range);
        }
    }

    /// Plans writing `bytes` at `at` in a hidden piece, whether or not the guest maps it yet. Nothing for the cave.
    pub fn plan_hidden(
        &self,
        piece: Allocation,
        at: Gva,
        bytes: &[u8],
        plan: &mut WriteBatch,
    ) -> bool {
        let window = piece.window.and_then(|at| self.windows.get(at));
        if let Some(window) = window {
            plan.write(window.gpa_of(at), bytes);
        }
        window.is_some()
    }

    /// Plans filling `piece` with `bytes` from its start.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_fill(
        &self,
        memory: &KernelMemory<'_>,
        piece: Allocation,
        bytes: &[u8],
        plan: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        self.plan_part(memory, piece, piece.range.start, bytes, plan)
    }

    /// Plans writing `bytes` at `at` in `piece`.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_part(
        &self,
        memory: &KernelMemory<'_>,
        piece: Allocation,
        at: Gva,
        bytes: &[u8],
        plan: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        if self.plan_hidden(piece, at, bytes, plan) {
            return Ok(());
        }
        plan.write_kernel(memory, at, bytes)
    }

    /// Plans what leaves `piece` as it was before it was ours.
    ///
    /// # Errors
    /// [`ReadError`] when the cave is not mapped.
    pub fn plan_clear(
        &self,
        memory: &KernelMemory<'_>,
        piece: Allocation,
        plan: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        let filler = vec![INT3; usize::try_from(piece.range.len()).unwrap_or_default()];
        self.plan_fill(memory, piece, &filler, plan)
    }

    /// In a pause, before anything is written: the windows are as we left them, and `code` is still nobody's.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn check(&self, memory: &KernelMemory<'_>, code: Allocation) -> Result<(), StepError> {
        for window in &self.windows {
            if !window.is_unchanged(memory)? {
                return Err(PatchMemoryError::EntryTaken(window.entry).into());
            }
        }
        if code.window.is_none() && !cave::is_filler(memory, code.range)? {
            return Err(PatchMemoryError::PaddingTaken(code.range.start).into());
        }
        Ok(())
    }

    /// Plans the mapping of every window that the guest does not map yet.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan_mapping(
        &self,
        memory: &KernelMemory<'_>,
        plan: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        (self.windows.iter()).try_for_each(|window| window.plan_mapping(memory, plan))
    }

    /// Whether the guest's tables lead to every window, now that the mapping is written.
    ///
    /// # Errors
    /// [`PatchMemoryError`].
    pub fn check_mapping(&self, memory: &KernelMemory<'_>) -> Result<(), PatchError> {
        match self.windows.iter().find(|window| !window.is_mapped(memory)) {
            None => Ok(()),
            Some(window) => Err(PatchMemoryError::NotMapped(window.room.range().start).into()),
        }
    }

    /// The mappings are in the guest for good.
    pub fn mapped(&mut self) {
        for window in &mut self.windows {
            window.mapped = true;
        }
    }
}
