//! The dry run of a patch: everything that `apply` does up to its first write, with the same code.
//!
//! The patch is prepared on a machine that refuses writes, and its memory allocated in a copy of
//! the guest's [`PatchMemory`], so that nothing is left of it afterwards.

use std::time::Duration;

use introspect::{Gva, PhysMemory, Task, VcpuRegs};

use crate::error::{PatchError, StepError};
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

/// A patch that is prepared up to the pause in which its transition would start.
pub struct DryRun {
    patch: Patch,
    patch_memory: PatchMemory,
    dummy: Option<Gva>,
    is_only_patch: bool,
}

impl DryRun {
    /// Allocates memory for `module` and links it, as [`prepare::prepare_patch`] does.
    ///
    /// # Errors
    /// [`PatchError`], as from `apply`.
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
        let patch = prepare::prepare_patch(&mut machine, guest, &mut patch_memory, module, others)?;
        Ok(DryRun {
            patch,
            patch_memory,
            dummy,
            is_only_patch: others.is_empty(),
        })
    }

    /// Plans the first step, in a pause. Returns the tasks, the step, and the number of stacks that
    /// were walked.
    ///
    /// # Errors
    /// [`StepError`], as from the first step.
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
            is_only_patch: self.is_only_patch,
            waker: None,
            pending: None,
        };
        let step = context.start(Direction::Apply, false)?;
        Ok((view.tasks().cloned().collect(), step, view.walked()))
    }

    /// The code that a task must have left to switch.
    #[must_use]
    pub fn code_to_leave(&self) -> CodeSet {
        self.patch.code_to_leave(Direction::Apply)
    }

    /// Removes the patch from the guest's unwinder.
    pub fn remove_from(&self, guest: &mut Guest) {
        self.patch.remove_from(&mut guest.unwinder);
    }

    /// The report of the dry run, from the tasks and the step of [`step`](Self::step).
    #[must_use]
    pub fn report(&self, tasks: &[Task], step: Step, pauses: PauseReport) -> CheckReport {
        let mut progress = Progress::default();
        progress.record(Duration::ZERO, tasks.iter().zip(step.outcomes));
        let mut tasks = progress.reports();
        for task in &mut tasks {
            // No transition was started, so there are no times in it.
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
            code: allocation_report(patch.code),
            rodata: allocation_report(patch.rodata),
            data: allocation_report(patch.data),
            tasks,
            at_once: step.finished,
            pauses,
        }
    }
}

fn allocation_report(allocation: Allocation) -> AllocationReport {
    AllocationReport {
        address: allocation.range.start.to_string(),
        bytes: allocation.range.len(),
    }
}
