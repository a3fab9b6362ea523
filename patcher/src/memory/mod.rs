//! Where a patch lies in the guest, and what place is left for others.
//!
//! Puts [`cave`](crate::memory::cave) and [`window`](crate::memory::hidden_window) together: code goes into the cave, or into a hidden window where the
//! kernel has none; data, and the stand-in for the kernel's own `klp_transition_patch`, into a hidden window. Nothing here
//! touches what the guest sees: that is planned here and carried out by the transition.

pub mod cave;
pub mod hidden_window;
pub mod range_alloc;
pub mod write_batch;

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, GvaRange, Kernel};

use crate::error::PatchError;
use crate::guest::kernel_info::KernelInfo;
use crate::machine::Machine;
use crate::memory::hidden_window::{HiddenWindow, Use, WINDOW};
use crate::memory::range_alloc::RangeAllocator;
use crate::memory::write_batch::WriteBatch;
use crate::transition::preconditions::StepError;

/// More hidden memory than this many windows is not given to one guest.
const MOST_WINDOWS: usize = 16;

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
    dummy: Option<Gva>,
}

impl PatchMemory {
    /// Takes room for code.
    ///
    /// # Errors
    /// [`PatchError::NoRoom`].
    pub fn take_code<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        if self.cave.is_none() {
            let memory = kernel.memory(machine.memory());
            self.cave = Some(cave::find(&memory, &facts.text)?.map(RangeAllocator::new));
        }
        let in_cave = (self.cave.as_mut())
            .and_then(Option::as_mut)
            .and_then(|room| room.take(need.len, need.align));
        match in_cave {
            Some(range) => Ok(Allocation {
                range,
                window: None,
            }),
            None => self.take_hidden(machine, kernel, facts, Use::Code, need),
        }
    }

    /// Takes room for data. The piece is zeroed before the guest can see it only if its owner writes it whole.
    ///
    /// # Errors
    /// [`PatchError::NoRoom`].
    pub fn take_data<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        self.take_hidden(machine, kernel, facts, Use::Data, need)
    }

    fn take_hidden<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
        usage: Use,
        need: Request,
    ) -> Result<Allocation, PatchError> {
        if need.len > WINDOW {
            return Err(PatchError::NoRoom(format!(
                "{} bytes of {} in one piece; at most {WINDOW} are possible",
                need.len,
                match usage {
                    Use::Code => "code",
                    Use::Data => "data",
                }
            )));
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
        let mut window = self.new_window(machine, kernel, facts, usage)?;
        let range = window.room.take(need.len, need.align);
        self.windows.push(window);
        range
            .map(|range| Allocation {
                range,
                window: Some(self.windows.len() - 1),
            })
            .ok_or_else(|| PatchError::NoRoom("an alignment that no window has".into()))
    }

    fn new_window<M: Machine>(
        &self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
        usage: Use,
    ) -> Result<HiddenWindow, PatchError> {
        if self.windows.len() >= MOST_WINDOWS {
            return Err(PatchError::NoRoom(format!(
                "{MOST_WINDOWS} hidden windows are all in use"
            )));
        }
        let taken: Vec<Gva> = self.windows.iter().map(|window| window.entry).collect();
        let gpa = machine.add_hidden_memory(WINDOW)?;
        let memory = kernel.memory(machine.memory());
        let chosen = HiddenWindow::choose(&memory, facts.fixmap_table, usage, gpa, &taken);
        let failure = match chosen {
            Ok(Some(window)) => return Ok(window),
            Ok(None) => PatchError::NoRoom(
                "every entry of level2_fixmap_pgt that could be ours is in use".into(),
            ),
            Err(error) => error.into(),
        };
        machine.remove_hidden_memory(gpa)?;
        Err(failure)
    }

    /// Gives a piece back. What the guest can see of it has been put back before.
    pub fn give_back(&mut self, piece: Allocation) {
        let room = match piece.window {
            None => self.cave.as_mut().and_then(Option::as_mut),
            Some(at) => self.windows.get_mut(at).map(|window| &mut window.room),
        };
        if let Some(room) = room {
            room.give_back(piece.range);
        }
    }

    /// The stand-in for `klp_transition_patch` during our transitions: a `struct klp_patch` of zeroes with empty lists, so that
    /// the guest's own livepatching answers -EBUSY and whatever walks it finds nothing. `None` in a guest that has no such.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn dummy<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
    ) -> Result<Option<Gva>, PatchError> {
        if self.dummy.is_some() {
            return Ok(self.dummy);
        }
        let piece = self.take_dummy(machine, kernel, facts)?;
        let (Some(klp), Some(piece)) = (&facts.klp, piece) else {
            return Ok(None);
        };
        let at = piece.range.start;
        let mut plan = WriteBatch::new();
        let zeroes = vec![0; usize::try_from(klp.patch_size).unwrap_or_default()];
        self.plan_hidden(piece, at, &zeroes, &mut plan);
        for list in &klp.patch_lists {
            let head = list.of(at);
            let link = head.0.to_le_bytes();
            self.plan_hidden(piece, head, &[link, link].concat(), &mut plan);
        }
        if let Err(error) = plan.commit(machine) {
            self.give_back(piece);
            return Err(error);
        }
        self.dummy = Some(at);
        Ok(self.dummy)
    }

    /// Takes room for the stand-in, if one is needed.
    ///
    /// # Errors
    /// [`PatchError::NoRoom`].
    pub fn take_dummy<M: Machine>(
        &mut self,
        machine: &mut M,
        kernel: &Kernel,
        facts: &KernelInfo,
    ) -> Result<Option<Allocation>, PatchError> {
        let Some(klp) = &facts.klp else {
            return Ok(None);
        };
        let need = Request {
            len: klp.patch_size,
            align: 64,
        };
        self.take_data(machine, kernel, facts, need).map(Some)
    }

    /// The stand-in, once it is there.
    #[must_use]
    pub fn known_dummy(&self) -> Option<Gva> {
        self.dummy
    }

    /// Plans writing `bytes` at `at` in a hidden piece, whether or not the guest maps it yet. Nothing for the cave.
    fn plan_hidden(&self, piece: Allocation, at: Gva, bytes: &[u8], plan: &mut WriteBatch) -> bool {
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
        let filler = vec![cave::FILLER; usize::try_from(piece.range.len()).unwrap_or_default()];
        self.plan_fill(memory, piece, &filler, plan)
    }

    /// In a pause, before anything is written: the windows are as we left them, and `code` is still nobody's.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn check(&self, memory: &KernelMemory<'_>, code: Allocation) -> Result<(), StepError> {
        for window in &self.windows {
            if !window.is_intact(memory)? {
                return Err(StepError::Fail(PatchError::NoRoom(format!(
                    "the guest took the page table entry at {} for something else",
                    window.entry
                ))));
            }
        }
        if code.window.is_none() && !cave::is_filler(memory, code.range)? {
            return Err(StepError::Fail(PatchError::NoRoom(format!(
                "the padding of the kernel's text at {} is no longer padding",
                code.range.start
            ))));
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
    /// [`PatchError::NoRoom`].
    pub fn check_mapping(&self, memory: &KernelMemory<'_>) -> Result<(), PatchError> {
        match self
            .windows
            .iter()
            .find(|window| !window.is_reached(memory))
        {
            None => Ok(()),
            Some(window) => Err(PatchError::NoRoom(format!(
                "the guest's page tables do not lead to {}: level2_fixmap_pgt is not where it should be",
                window.room.range().start
            ))),
        }
    }

    /// The mappings are in the guest for good.
    pub fn mapped(&mut self) {
        for window in &mut self.windows {
            window.mapped = true;
        }
    }
}
