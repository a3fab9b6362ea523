//! Takes the steps of a transition. For each, the guest is paused and read, the step is planned
//! ([`transition::step`](crate::transition::step)), its writes are committed and its interrupts
//! sent, and the guest resumed.
//!
//! This is the only place that writes what the guest sees.

use std::thread::sleep;
use std::time::Duration;

use introspect::task_list::TaskCache;

use crate::error::{PatchError, StepError};
use crate::guest::pause::PauseGuard;
use crate::livepatch::direction::Direction;
use crate::livepatch::func::Target;
use crate::livepatch::func_stack;
use crate::livepatch::prepare;
use crate::machine::Machine;
use crate::memory::grace_period::GracePeriod;
use crate::memory::write_batch::WriteBatch;
use crate::patcher::{Patcher, Running, no_kernel, no_patch, retry_while_busy};
use crate::report::patch::{Mode, PatchPhase};
use crate::report::pause::PauseReport;
use crate::transition::Transition;
use crate::transition::step::{Step, StepContext};

/// The vector of the reschedule interrupt
/// (`arch/x86/include/asm/irq_vectors.h: RESCHEDULE_VECTOR`), the same since x86-64 has it. A guest
/// that gets it without need does nothing.
const RESCHEDULE_VECTOR: u8 = 0xfd;
/// How often all tasks are tried to be switched in one pause: where nothing else will do, and where
/// it is only preferred.
const STOP_MACHINE_TRIES: u32 = 20;
const AUTO_TRIES: u32 = 3;
/// The time between two such tries.
const STOP_MACHINE_WAIT: Duration = Duration::from_millis(2);

impl Patcher {
    /// Starts a transition of patch `at` (`klp_init_transition`, `klp_start_transition`).
    pub(super) fn start<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        direction: Direction,
        mode: Mode,
    ) -> Result<(), PatchError> {
        let tries = match mode {
            Mode::PerTask => 0,
            Mode::Auto => AUTO_TRIES,
            Mode::StopMachine => STOP_MACHINE_TRIES,
        };
        self.update_stubs(at, direction)?;
        let mut refusal = None;
        for attempt in 0..tries {
            if attempt > 0 {
                sleep(STOP_MACHINE_WAIT);
            }
            match self.start_once(machine, at, direction, true) {
                Err(error @ PatchError::NotAtOnce { .. }) => refusal = Some(error),
                result => return result,
            }
        }
        match (mode, refusal) {
            (Mode::StopMachine, Some(refusal)) => Err(refusal),
            _ => self.start_once(machine, at, direction, false),
        }
    }

    /// Makes the stubs of a patch that is to be reverted lead to the functions that calls now reach
    /// without it: other patches may have come or gone.
    fn update_stubs(&mut self, at: usize, direction: Direction) -> Result<(), PatchError> {
        if direction == Direction::Apply {
            return Ok(());
        }
        let guest = self.guest.as_ref().ok_or_else(no_kernel)?;
        func_stack::update_superseded(&mut self.patches, at);
        let patch = self.patches.get_mut(at).ok_or_else(no_patch)?;
        prepare::update_stubs(patch, guest.info()?)
    }

    fn start_once<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        direction: Direction,
        in_one_pause: bool,
    ) -> Result<(), PatchError> {
        self.running = Some(Running {
            at,
            transition: Transition::new(direction),
        });
        let started = retry_while_busy(|| {
            self.run_step(machine, |context| context.start(direction, in_one_pause))
        });
        match started {
            Ok((step, pause)) => {
                self.enter_phase(direction, pause);
                self.record(step);
                Ok(())
            }
            Err(error) => {
                self.running = None;
                Err(error)
            }
        }
    }

    /// Reverses the running transition (`klp_reverse_transition`).
    pub(super) fn reverse<M: Machine>(&mut self, machine: &mut M) -> Result<(), PatchError> {
        let running = self.running.as_ref().ok_or_else(no_patch)?;
        let from = running.transition.direction;
        let to = from.opposite();
        let (step, pause) =
            retry_while_busy(|| self.run_step(machine, |context| context.reverse(from, to)))?;
        if let Some(running) = &mut self.running {
            running.transition.reverse(to);
        }
        self.enter_phase(to, pause);
        self.record(step);
        Ok(())
    }

    /// The step that makes the running transition go in `direction` was taken, in a pause of this
    /// length.
    fn enter_phase(&mut self, direction: Direction, pause: Duration) {
        let Some(running) = &mut self.running else {
            return;
        };
        running.transition.step_taken(pause);
        if let Some(patch) = self.patches.get_mut(running.at) {
            patch.phase = direction.phase();
        }
    }

    /// Records what a step that was taken found of each task, and ends the transition if the step
    /// completed it (`klp_complete_transition`).
    pub(super) fn record(&mut self, step: Step) {
        let (Some(guest), Some(running)) = (&self.guest, &mut self.running) else {
            return;
        };
        let tasks = guest.task_cache.tasks().iter().map(|cached| &cached.task);
        running.transition.record(tasks, step.outcomes);
        if step.finished
            && let Some(Running { at, transition }) = self.running.take()
        {
            self.finish(at, transition, step.grace_period);
        }
    }

    fn finish(&mut self, at: usize, transition: Transition, grace_period: Option<GracePeriod>) {
        let Some(patch) = self.patches.get_mut(at) else {
            return;
        };
        let direction = transition.direction;
        patch.last_transition = transition.into_summary();
        match direction {
            Direction::Apply => {
                patch.phase = PatchPhase::Applied;
                self.remove_replaced(at, grace_period);
            }
            Direction::Revert => {
                patch.phase = PatchPhase::Reverted;
                let status = patch.status(None);
                self.set_reverted(Some(status));
                self.remove_patch(at, grace_period);
            }
        }
    }

    /// Removes the patches that patch `at` has replaced, and the functions that it has only to make
    /// calls reach the original again (`klp_unpatch_replaced_patches`, `klp_discard_nops`).
    fn remove_replaced(&mut self, at: usize, grace_period: Option<GracePeriod>) {
        let Some(patch) = self.patches.get_mut(at) else {
            return;
        };
        if !patch.image.replace {
            return;
        }
        patch.replaces.clear();
        for _ in 0..at {
            if let Some(old) = self.patches.first_mut() {
                old.phase = PatchPhase::Reverted;
                let status = old.status(None);
                self.set_reverted(Some(status));
            }
            self.remove_patch(0, grace_period);
        }
        if let Some(patch) = self.patches.first_mut() {
            patch
                .functions
                .retain(|function| function.new != Target::Original);
        }
    }

    /// Removes a patch that is no longer in force from the list. Frees its memory once
    /// `grace_period` has passed, but for what the guest may still use; at once if the guest has
    /// never seen it.
    pub(super) fn remove_patch(&mut self, at: usize, grace_period: Option<GracePeriod>) {
        if at >= self.patches.len() {
            return;
        }
        let patch = self.patches.remove(at);
        func_stack::remove(&mut self.patches, &patch);
        let was_run = grace_period.is_some();
        if was_run {
            self.kept_bytes = self.kept_bytes.saturating_add(patch.kept_bytes());
        }
        let (keeps_code, keeps_data) =
            (was_run && patch.keeps_code(), was_run && patch.keeps_data());
        let data = patch.data_memory().into_iter().filter(|_| !keeps_data);
        let code = patch.code_memory().into_iter().filter(|_| !keeps_code);
        for memory in data.chain(code) {
            match grace_period {
                Some(grace_period) => self.patch_memory.free_after(memory, grace_period),
                None => self.patch_memory.free(memory),
            }
        }
        // The unwinder keeps the code that is kept, too: it may still be on a stack.
        if let Some(guest) = self.guest.as_mut().filter(|_| !keeps_code) {
            patch.remove_from(&mut guest.unwinder);
        }
    }

    /// Takes one step of the running transition: a pause in which `plan` makes a step of what the
    /// guest's memory shows, its writes and interrupts, and the guest running again with its
    /// sleepers woken. Returns the step and the length of the pause.
    pub(super) fn run_step<M: Machine>(
        &mut self,
        machine: &mut M,
        plan: impl FnOnce(&StepContext<'_>) -> Result<Step, StepError>,
    ) -> Result<(Step, Duration), StepError> {
        let mut meter = PauseReport::default();
        let result = self.in_pause(machine, &mut meter, plan);
        self.pauses.merge(&meter);
        if let Some(running) = &mut self.running {
            running.transition.pauses.merge(&meter);
        }
        let mut step = match result {
            Ok(step) => step,
            Err(StepError::Failed(error)) => {
                return Err(StepError::Failed(self.forget_replaced_kernel(error)));
            }
            Err(busy) => return Err(busy),
        };
        if let Some(running) = &mut self.running
            && step.pending.is_some()
        {
            running.transition.pending = step.pending.take();
        }
        if let Some(kick) = step.wake {
            // The work is queued: without the interrupt the guest runs it on its next tick.
            if let Err(error) = machine.interrupt(kick.vcpu, kick.vector) {
                tracing::warn!(%error, "sleepers are woken later");
            }
        }
        Ok((step, Duration::from_micros(meter.longest_us)))
    }

    fn in_pause<M: Machine>(
        &mut self,
        machine: &mut M,
        meter: &mut PauseReport,
        plan: impl FnOnce(&StepContext<'_>) -> Result<Step, StepError>,
    ) -> Result<Step, StepError> {
        let guest = self.guest.as_mut().ok_or_else(no_kernel)?;
        let info = guest.info()?.clone();
        let Running { at, transition } = self.running.as_ref().ok_or_else(no_patch)?;
        let patch = self.patches.get(*at).ok_or_else(no_patch)?;
        if self.walks_in_the_pause {
            guest.task_cache = TaskCache::new();
        } else {
            guest.prewalk(machine.memory(), &patch.code_to_leave(transition.direction));
        }
        let signalling = transition.is_signalling();
        let mut paused = PauseGuard::begin(machine, meter)?;
        guest.check_not_panicked(paused.memory())?;
        let mut mapping = WriteBatch::new();
        let (step, tasks, walked) = {
            let view = guest.view(paused.memory(), &paused.vcpus)?;
            self.patch_memory.plan_mapping(&view.memory, &mut mapping)?;
            let context = StepContext {
                view: &view,
                info: &info,
                patch_memory: &self.patch_memory,
                dummy: self.dummy,
                patch,
                is_only_patch: self.patches.len() == 1,
                waker: self.waker.as_ref().filter(|_| signalling),
                pending: transition.pending.as_ref(),
            };
            let step = plan(&context);
            (step, view.cached().len(), view.walked())
        };
        paused.note(tasks, walked);
        let step = step?;
        let mapped = paused.commit(&mapping)?;
        let reached = self
            .patch_memory
            .check_mapping(&guest.kernel.memory(paused.memory()));
        let written = match reached.and_then(|()| paused.commit(&step.writes)) {
            Ok(written) => written,
            Err(error) => return Err(paused.undo(&mapped, error).into()),
        };
        // Before the guest runs: its own wakeups send no interrupt to a CPU whose idle task has
        // TIF_NEED_RESCHED already (`kernel/sched/core.c: resched_curr`), and without ours that CPU
        // would sleep on.
        let mut vcpus = step.reschedule.iter();
        if let Err(error) = vcpus.try_for_each(|vcpu| paused.interrupt(*vcpu, RESCHEDULE_VECTOR)) {
            let error = paused.undo(&written, error.into());
            return Err(paused.undo(&mapped, error).into());
        }
        self.patch_memory.mapped();
        if let (Some(waker), Some(_)) = (&mut self.waker, step.wake) {
            waker.used = true;
        }
        if let Err(error) = paused.resume() {
            // What was written stands; the machine reports the rest with its next answer.
            tracing::error!(%error, "the guest could not be resumed");
        }
        Ok(step)
    }
}
