//! What a look plans to write, piece by piece: states, flags, entries, the kernel's own account of a transition.

use introspect::{Task, TaskKind};

use crate::error::PatchError;
use crate::error::StepError;
use crate::livepatch::direction::Direction;
use crate::livepatch::func::PatchedFunction;
use crate::memory::write_batch::WriteBatch;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::preconditions::NO_STATE;
use crate::x86::{EncodeError, SITE_LEN};

use crate::transition::step::{Step, StepContext};

impl StepContext<'_> {
    /// The code, where a transition in this direction begins with it.
    pub(super) fn plan_code(
        &self,
        direction: Direction,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        if direction == Direction::Apply || self.patch.stubs_changed {
            let (memory, patch) = (&self.view.memory, self.patch);
            self.patch_memory
                .plan_fill(memory, patch.code, &patch.code_bytes, plan)?;
        }
        Ok(())
    }

    /// What the entries, their records and the code's place hold from now on.
    pub(super) fn plan_end(
        &self,
        direction: Direction,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let memory = &self.view.memory;
        match direction {
            Direction::Apply => {
                self.plan_sites(plan, PatchedFunction::to_new)?;
                for old in self.patch.replaces.iter().filter(|old| !old.stays) {
                    self.patch_memory.plan_clear(memory, old.code, plan)?;
                }
                Ok(())
            }
            Direction::Revert => {
                self.plan_sites(plan, PatchedFunction::to_previous)?;
                if !self.patch.forced {
                    self.patch_memory
                        .plan_clear(memory, self.patch.code, plan)?;
                }
                Ok(())
            }
        }
    }

    /// Plans what each entry is to hold, and with it that ftrace leaves the entry alone, unless it holds its own NOP again: then its
    /// record counts who came to trace it meanwhile. The entry of a function that a newer patch serves is that one's.
    pub(super) fn plan_sites(
        &self,
        plan: &mut WriteBatch,
        bytes: impl Fn(&PatchedFunction) -> Result<[u8; SITE_LEN], EncodeError>,
    ) -> Result<(), StepError> {
        let memory = &self.view.memory;
        let served = |function: &&PatchedFunction| function.superseded_by.is_none();
        for function in self.patch.functions.iter().filter(served) {
            let site = &function.site;
            let bytes = bytes(function).map_err(PatchError::from)?;
            let types = &self.info.ftrace;
            let (flags, value) = if bytes == site.nop {
                let tracers = self.info.tracers.record_flags(memory, site.at);
                site.enable(memory, types, tracers.map_err(PatchError::from)?)?
            } else {
                site.disable(memory, types)?
            };
            plan.write_kernel(memory, flags, &value)?;
            plan.write_kernel(memory, site.at, &bytes)?;
        }
        Ok(())
    }

    pub(super) fn plan_globals(
        &self,
        target: i32,
        patch: Option<introspect::Gva>,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let Some(klp) = &self.info.klp else {
            return Ok(());
        };
        let memory = &self.view.memory;
        let patch = patch.unwrap_or_default().0;
        plan.write_kernel(memory, klp.target_state, &target.to_le_bytes())?;
        plan.write_kernel(memory, klp.transition_patch, &patch.to_le_bytes())?;
        Ok(())
    }

    /// Nobody has a state, and nobody is to change it.
    pub(super) fn plan_states_idle(&self, plan: &mut WriteBatch) -> Result<(), StepError> {
        if self.info.klp.is_none() {
            // Nor does any stub ask any more.
            return Ok(());
        }
        for task in self.view.tasks() {
            self.plan_pending(task, false, plan)?;
            self.plan_state(task, NO_STATE, plan)?;
        }
        Ok(())
    }

    /// Writes down who has yet to move, in a guest that has no states of its own. Nobody may be in a stub, looking somebody up.
    pub(super) fn plan_pending_tasks(
        &self,
        direction: Direction,
        pending: impl IntoIterator<Item = introspect::Gva>,
        step: &mut Step,
    ) -> Result<(), StepError> {
        let Some(piece) = self.patch.table else {
            return Ok(());
        };
        self.view.no_task_in(&self.patch.stub_code())?;
        let pending = PendingTasks::new(piece, direction, pending)?;
        let memory = &self.view.memory;
        (self.patch_memory).plan_fill(memory, piece, &pending.bytes(), &mut step.plan)?;
        step.pending = Some(pending);
        Ok(())
    }

    /// Writes down, likewise, that these have moved.
    pub(super) fn plan_switched(
        &self,
        moved: impl IntoIterator<Item = introspect::Gva>,
        step: &mut Step,
    ) -> Result<(), StepError> {
        let Some(mut pending) = self.pending.cloned() else {
            return Ok(());
        };
        let memory = &self.view.memory;
        for task in moved {
            if let Some((at, bytes)) = pending.remove(task) {
                let plan = &mut step.plan;
                (self.patch_memory).plan_part(memory, pending.piece(), at, &bytes, plan)?;
            }
        }
        step.pending = Some(pending);
        Ok(())
    }

    pub(super) fn plan_state(
        &self,
        task: &Task,
        state: i32,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let Some(klp) = &self.info.klp else {
            return Ok(());
        };
        let at = klp.patch_state.of(task.addr);
        plan.write_kernel(&self.view.memory, at, &state.to_le_bytes())?;
        Ok(())
    }

    /// Plans `task`'s TIF_PATCH_PENDING. Nobody else writes the flags in this pause, so the others keep their values.
    pub(super) fn plan_pending(
        &self,
        task: &Task,
        pending: bool,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        self.plan_flags(task, pending, 0, plan)
    }

    /// The same, with other flags set.
    pub(super) fn plan_flags(
        &self,
        task: &Task,
        pending: bool,
        others: u64,
        plan: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let (Some(klp), tif) = (&self.info.klp, &self.info.tif) else {
            // The flag has no meaning there: the guest's exit to user mode would go round for ever.
            return Ok(());
        };
        let wanted = |flags: u64| {
            let flags = if pending {
                flags | klp.pending
            } else {
                flags & !klp.pending
            };
            // An idle task looks at its flag only when it goes round its loop.
            let resched = match (pending, task.kind) {
                (true, TaskKind::Idle) => tif.need_resched.unwrap_or_default(),
                _ => 0,
            };
            flags | others | resched
        };
        if wanted(task.tif) != task.tif {
            let memory = &self.view.memory;
            // The whole word is written: the other flags are not to be those of any earlier moment.
            let flags = wanted(memory.field(task.addr, tif.flags)?);
            plan.write_kernel(memory, tif.flags.of(task.addr), &flags.to_le_bytes())?;
        }
        Ok(())
    }
}
