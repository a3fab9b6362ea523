//! Plans the writes of a step: the patch's code, the entries, task states and flags, and the
//! variables of the guest's own livepatching.
//!
//! This module adds to a [`WriteBatch`], which [`Patcher`](crate::patcher) commits in the same
//! pause; it writes nothing itself.

use introspect::{Gva, Task, TaskKind};

use crate::error::{PatchError, StepError};
use crate::livepatch::direction::Direction;
use crate::livepatch::func::PatchedFunction;
use crate::memory::write_batch::WriteBatch;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::preconditions::NO_STATE;
use crate::transition::step::{Step, StepContext};
use crate::x86::{EncodeError, SITE_LEN};

impl StepContext<'_> {
    /// Plans the code of the patch, if a transition in this direction has to write it first.
    pub(super) fn plan_code(&self, direction: Direction, writes: &mut WriteBatch) {
        if direction == Direction::Apply || self.patch.stubs_changed {
            let patch = self.patch;
            (self.patch_memory).plan_fill(patch.code, &patch.code_bytes, writes);
        }
    }

    /// Plans the completion of a transition (`klp_complete_transition`): the entries, their ftrace
    /// records, and the clearing of code that is freed.
    pub(super) fn plan_completion(
        &self,
        direction: Direction,
        writes: &mut WriteBatch,
    ) -> Result<(), StepError> {
        match direction {
            Direction::Apply => self.plan_sites(writes, PatchedFunction::to_new)?,
            Direction::Revert => self.plan_sites(writes, PatchedFunction::to_previous)?,
        }
        for freed in self.freed(direction) {
            self.patch_memory.plan_clear(freed.code, writes);
        }
        Ok(())
    }

    /// Plans the `bytes` of each entry. While an entry does not hold its NOP, its record is
    /// disabled, so that ftrace leaves it alone; when the NOP is back, the record counts the
    /// `ftrace_ops` that have come to cover the function meanwhile. The entry of a function that a
    /// newer patch replaces belongs to that patch and is not written.
    pub(super) fn plan_sites(
        &self,
        writes: &mut WriteBatch,
        bytes: impl Fn(&PatchedFunction) -> Result<[u8; SITE_LEN], EncodeError>,
    ) -> Result<(), StepError> {
        let memory = &self.view.memory;
        let owns_entry = |function: &&PatchedFunction| function.superseded_by.is_none();
        for function in self.patch.functions.iter().filter(owns_entry) {
            let site = &function.site;
            let bytes = bytes(function).map_err(PatchError::from)?;
            let layout = &self.info.ftrace;
            let (flags, value) = if bytes == site.nop {
                let users = self.info.ftrace_ops.record_flags(memory, site.at);
                site.enable(memory, layout, users.map_err(PatchError::from)?)?
            } else {
                site.disable(memory, layout)?
            };
            writes.write_kernel(memory, flags, &value)?;
            writes.write_kernel(memory, site.at, &bytes)?;
        }
        Ok(())
    }

    /// Plans `klp_target_state` and `klp_transition_patch`, in that order.
    pub(super) fn plan_klp_variables(
        &self,
        target: i32,
        patch: Option<Gva>,
        writes: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let Some(klp) = &self.info.klp else {
            return Ok(());
        };
        let memory = &self.view.memory;
        let patch = patch.unwrap_or_default().0;
        writes.write_kernel(memory, klp.target_state, &target.to_le_bytes())?;
        writes.write_kernel(memory, klp.transition_patch, &patch.to_le_bytes())?;
        Ok(())
    }

    /// Plans the state outside transitions for every task: no patch state, and no
    /// TIF_PATCH_PENDING.
    pub(super) fn plan_idle_states(&self, writes: &mut WriteBatch) -> Result<(), StepError> {
        if self.info.klp.is_none() {
            // Stubs looked tasks up in the table, and no entry leads to a stub from now on.
            return Ok(());
        }
        for task in self.view.tasks() {
            self.plan_pending_flag(task, false, writes)?;
            self.plan_state(task, NO_STATE, writes)?;
        }
        Ok(())
    }

    /// Plans the table of `pending` tasks, in a guest that keeps no patch states. No task may be in
    /// a stub, which looks tasks up.
    pub(super) fn plan_pending_table(
        &self,
        direction: Direction,
        pending: impl IntoIterator<Item = Gva>,
        step: &mut Step,
    ) -> Result<(), StepError> {
        let Some(table) = self.patch.table else {
            return Ok(());
        };
        self.view.check_no_task_in(&self.patch.stub_code())?;
        let pending = PendingTasks::new(table, direction, pending)?;
        (self.patch_memory).plan_fill(table, &pending.bytes(), &mut step.writes);
        step.pending = Some(pending);
        Ok(())
    }

    /// Plans the removal of the `switched` tasks from that table.
    pub(super) fn plan_pending_removal(
        &self,
        switched: impl IntoIterator<Item = Gva>,
        step: &mut Step,
    ) -> Result<(), StepError> {
        let Some(mut pending) = self.pending.cloned() else {
            return Ok(());
        };
        for task in switched {
            if let Some((at, bytes)) = pending.remove(task) {
                let (table, writes) = (pending.allocation(), &mut step.writes);
                (self.patch_memory).plan_part(table, at, &bytes, writes);
            }
        }
        step.pending = Some(pending);
        Ok(())
    }

    /// Plans `task`'s patch state.
    pub(super) fn plan_state(
        &self,
        task: &Task,
        state: i32,
        writes: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let Some(klp) = &self.info.klp else {
            return Ok(());
        };
        let at = klp.patch_state.of(task.addr);
        writes.write_kernel(&self.view.memory, at, &state.to_le_bytes())?;
        Ok(())
    }

    /// Plans `task`'s TIF_PATCH_PENDING. Nothing else writes the thread flags in this pause, so the
    /// other flags keep their values.
    pub(super) fn plan_pending_flag(
        &self,
        task: &Task,
        pending: bool,
        writes: &mut WriteBatch,
    ) -> Result<(), StepError> {
        self.plan_thread_flags(task, pending, 0, writes)
    }

    /// Plans `task`'s TIF_PATCH_PENDING, and sets the flags in `others` too.
    pub(super) fn plan_thread_flags(
        &self,
        task: &Task,
        pending: bool,
        others: u64,
        writes: &mut WriteBatch,
    ) -> Result<(), StepError> {
        let (Some(klp), tif) = (&self.info.klp, &self.info.tif) else {
            // Without livepatching nothing clears the flag: the kernel exit would loop without end.
            return Ok(());
        };
        let wanted = |flags: u64| {
            let flags = if pending {
                flags | klp.pending
            } else {
                flags & !klp.pending
            };
            // An idle task checks TIF_PATCH_PENDING only when it goes through its loop.
            let resched = match (pending, task.kind) {
                (true, TaskKind::Idle) => tif.need_resched.unwrap_or_default(),
                _ => 0,
            };
            flags | others | resched
        };
        if wanted(task.tif) != task.tif {
            let memory = &self.view.memory;
            // The whole word is written, so the other flags are read now and not taken from `task`.
            let flags = wanted(memory.field(task.addr, tif.flags)?);
            writes.write_kernel(memory, tif.flags.of(task.addr), &flags.to_le_bytes())?;
        }
        Ok(())
    }
}
