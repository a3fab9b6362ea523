//! Applying a patch without applying it: everything that `apply` does up to its first write, with the same code.
//!
//! What is prepared is prepared on a machine that answers every read and takes no write, and in a copy of the book of places;
//! afterwards nothing is left of it.

use std::time::Duration;

use introspect::{Gva, PhysMemory, Task, VcpuRegs};

use crate::error::PatchError;
use crate::error::StepError;
use crate::guest::Guest;
use crate::guest::code_set::CodeSet;
use crate::livepatch::direction::Direction;
use crate::livepatch::dummy_patch;
use crate::livepatch::patch::Patch;
use crate::livepatch::prepare;
use crate::machine::Machine;
use crate::machine::read_only::DryRunMachine;
use crate::memory::{Allocation, PatchMemory};
use crate::module::LivepatchModule;
use crate::report::check::{AllocationReport, CheckReport, FoundFunction, FoundSymbol};
use crate::report::pause::PauseReport;
use crate::transition::progress::Progress;
use crate::transition::step::{Step, StepContext};

/// A patch as it would be, ready for the pause in which it would begin.
pub struct DryRun {
    patch: Patch,
    patch_memory: PatchMemory,
    dummy: Option<Gva>,
    alone: bool,
}

impl DryRun {
    /// Places and links `module` as [`prepare::prepare`] does.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn prepare<M: Machine>(
        machine: &mut M,
        guest: &mut Guest,
        (patch_memory, dummy): (&PatchMemory, Option<Gva>),
        module: &LivepatchModule,
        others: &[Patch],
    ) -> Result<DryRun, PatchError> {
        let mut machine = DryRunMachine::new(machine);
        let mut patch_memory = patch_memory.clone();
        let dummy = match dummy {
            Some(dummy) => Some(dummy),
            None => {
                let (kernel, info) = (&guest.kernel, guest.info()?);
                let allocation =
                    dummy_patch::allocate(&mut machine, kernel, info, &mut patch_memory)?;
                allocation.map(|allocation| allocation.range.start)
            }
        };
        let patch = prepare::prepare(&mut machine, guest, &mut patch_memory, module, others)?;
        Ok(DryRun {
            patch,
            patch_memory,
            dummy,
            alone: others.is_empty(),
        })
    }

    /// What the first pause would do, with the tasks that it would see, and the number of stacks that it would walk.
    ///
    /// # Errors
    /// [`StepError`], as the first pause would.
    pub fn step(
        &self,
        guest: &mut Guest,
        memory: &dyn PhysMemory,
        vcpus: &[VcpuRegs],
    ) -> Result<(Vec<Task>, Step, usize), StepError> {
        let info = guest.info()?.clone();
        let view = guest.view(memory, vcpus)?;
        let context = StepContext {
            view: &view,
            info: &info,
            patch_memory: &self.patch_memory,
            dummy: self.dummy,
            patch: &self.patch,
            alone: self.alone,
            signal: None,
            pending: None,
        };
        let step = context.start(Direction::Apply, false)?;
        Ok((view.tasks().cloned().collect(), step, view.walked()))
    }

    /// The code that tasks must have left.
    #[must_use]
    pub fn codes(&self) -> CodeSet {
        self.patch.code_to_leave(Direction::Apply)
    }

    /// Takes what it has in the unwinder out again.
    pub fn remove_from(&self, guest: &mut Guest) {
        self.patch.remove_from(&mut guest.unwinder);
    }

    /// What is to be said of it.
    #[must_use]
    pub fn report(&self, tasks: &[Task], step: Step, pauses: PauseReport) -> CheckReport {
        let mut progress = Progress::default();
        progress.record(Duration::ZERO, tasks.iter().zip(step.outcomes));
        let mut tasks = progress.reports();
        for task in &mut tasks {
            // No transition began.
            task.after_ms = None;
            task.since_ms = None;
        }
        let patch = &self.patch;
        let functions = patch.functions.iter().map(|function| {
            let original = function.original.first().copied().unwrap_or_default();
            FoundFunction {
                object: "vmlinux".into(),
                name: function.name.clone(),
                sympos: function.sympos,
                address: original.start.to_string(),
                size: original.len(),
            }
        });
        let symbols = patch.image.imports.iter().map(|import| FoundSymbol {
            name: import.name.clone(),
            address: import.address.to_string(),
        });
        CheckReport {
            name: patch.name().into(),
            functions: functions.collect(),
            symbols: symbols.collect(),
            code: piece(patch.code),
            data: patch.data.map(piece),
            tasks,
            at_once: step.finished,
            pauses,
        }
    }
}

fn piece(piece: Allocation) -> AllocationReport {
    AllocationReport {
        address: piece.range.start.to_string(),
        bytes: piece.range.len(),
        hidden: !piece.is_in_cave(),
    }
}
