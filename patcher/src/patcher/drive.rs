//! The pauses of a transition: each a look, a step, its writes, and the guest running again.

use std::thread::sleep;
use std::time::Duration;

use introspect::task_list::TaskCache;

use crate::error::PatchError;
use crate::guest::pause::PauseGuard;
use crate::livepatch::func_stack::{self, Target};
use crate::livepatch::prepare;
use crate::machine::Machine;
use crate::report::patch::{Mode, PatchPhase, PauseReport};
use crate::transition::preconditions::StepError;
use crate::transition::step::{Step, StepContext};
use crate::transition::{Direction, Transition};

use crate::patcher::{Patcher, not_found, patiently};

/// The vector of the reschedule interrupt (`arch/x86/include/asm/irq_vectors.h: RESCHEDULE_VECTOR`), which has not changed since
/// x86-64 has it; a guest that gets it without need does nothing.
const RESCHEDULE_VECTOR: u8 = 0xfd;
/// How often all tasks are tried to be moved in one pause, where that is wanted or nothing; and where it is only preferred.
const AT_ONCE_LOOKS: u32 = 20;
const AUTO_LOOKS: u32 = 3;
/// The time between two such tries.
const AT_ONCE_WAIT: Duration = Duration::from_millis(2);

impl Patcher {
    pub(super) fn begin<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        direction: Direction,
        mode: Mode,
    ) -> Result<(), PatchError> {
        let at_once = match mode {
            Mode::PerTask => 0,
            Mode::Auto => AUTO_LOOKS,
            Mode::StopMachine => AT_ONCE_LOOKS,
        };
        self.renew_stack(at, direction)?;
        let mut refusal = None;
        for look in 0..at_once {
            if look > 0 {
                sleep(AT_ONCE_WAIT);
            }
            match self.begin_once(machine, at, direction, true) {
                Err(error @ PatchError::NotAtOnce { .. }) => refusal = Some(error),
                done => return done,
            }
        }
        match (mode, refusal) {
            (Mode::StopMachine, Some(refusal)) => Err(refusal),
            _ => self.begin_once(machine, at, direction, false),
        }
    }

    /// What other patches have come to be to this one since it was applied.
    fn renew_stack(&mut self, at: usize, direction: Direction) -> Result<(), PatchError> {
        if direction == Direction::Apply {
            return Ok(());
        }
        let guest = self.guest.as_ref().ok_or_else(not_found)?;
        func_stack::note_covers(&mut self.patches, at);
        let patch = self.patches.get_mut(at).ok_or_else(not_found)?;
        prepare::renew_stubs(patch, guest.facts()?)
    }

    fn begin_once<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        direction: Direction,
        at_once: bool,
    ) -> Result<(), PatchError> {
        let mut transition = Some(Transition::new(direction));
        let (step, pause) = patiently(|| {
            self.carry_out_for(machine, at, &mut transition, |scene| {
                scene.begin(direction, at_once)
            })
        })?;
        if let Some(transition) = &mut transition {
            transition.looked(pause);
        }
        if let Some(patch) = self.patches.get_mut(at) {
            patch.transition = transition;
            patch.phase = direction.phase();
        }
        self.enter(at, direction, step);
        Ok(())
    }

    /// Turns the running transition of a patch round.
    pub(super) fn turn_round<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
    ) -> Result<(), PatchError> {
        let from = self.direction(at).ok_or_else(not_found)?;
        let to = from.back();
        let (step, pause) =
            patiently(|| self.carry_out(machine, at, |scene| scene.turn_round(from, to)))?;
        if let Some(patch) = self.patches.get_mut(at) {
            patch.phase = to.phase();
            if let Some(transition) = &mut patch.transition {
                transition.turn(to);
                transition.looked(pause);
            }
        }
        self.enter(at, to, step);
        Ok(())
    }

    /// Enters what a step found of those who were seen in its look, and ends the transition if the step did.
    pub(super) fn enter(&mut self, at: usize, direction: Direction, step: Step) {
        let (Some(guest), Some(patch)) = (&self.guest, self.patches.get_mut(at)) else {
            return;
        };
        let Some(transition) = &mut patch.transition else {
            return;
        };
        let tasks = guest.task_cache.tasks().iter().map(|seen| &seen.task);
        transition.enter(tasks, step.findings);
        if !step.finished {
            return;
        }
        patch.past = patch
            .transition
            .take()
            .map(Transition::end)
            .unwrap_or_default();
        match direction {
            Direction::Apply => {
                patch.phase = PatchPhase::Applied;
                self.drop_replaced(at);
            }
            Direction::Revert => {
                patch.phase = PatchPhase::Reverted;
                self.reverted = Some(patch.status());
                self.drop_patch(at);
            }
        }
    }

    /// The patches that patch `at` has taken the place of go, and with them the functions that it has only for their sake.
    fn drop_replaced(&mut self, at: usize) {
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
                self.reverted = Some(old.status());
            }
            self.drop_patch(0);
        }
        if let Some(patch) = self.patches.first_mut() {
            patch
                .redirects
                .retain(|redirect| redirect.new != Target::Original);
        }
    }

    /// Forgets a patch that is no longer in the guest.
    pub(super) fn drop_patch(&mut self, at: usize) {
        if at >= self.patches.len() {
            return;
        }
        let patch = self.patches.remove(at);
        func_stack::forget(&mut self.patches, &patch);
        if patch.forced {
            // Somebody may be in its code for ever: it stays where it is, and what is known of it stays known.
            return;
        }
        self.places.give_back(patch.code);
        let pieces = patch.data.into_iter().chain(patch.table);
        pieces.for_each(|data| self.places.give_back(data));
        if let Some(guest) = &mut self.guest {
            patch.forget(&mut guest.unwinder);
        }
    }

    /// One look at the guest for the patch's running transition: as [`carry_out_for`](Self::carry_out_for).
    pub(super) fn carry_out<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        make: impl FnOnce(&StepContext<'_>) -> Result<Step, StepError>,
    ) -> Result<(Step, Duration), StepError> {
        let mut transition = self.patches.get_mut(at).and_then(|p| p.transition.take());
        let done = self.carry_out_for(machine, at, &mut transition, make);
        if let Some(patch) = self.patches.get_mut(at) {
            patch.transition = transition;
        }
        done
    }

    /// One pause: a look, the step that `make` makes of it, its writes and interrupts, and the guest running again, its sleepers woken.
    fn carry_out_for<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        transition: &mut Option<Transition>,
        make: impl FnOnce(&StepContext<'_>) -> Result<Step, StepError>,
    ) -> Result<(Step, Duration), StepError> {
        let mut meter = PauseReport::default();
        let Some(transition) = transition else {
            return Err(StepError::Fail(not_found()));
        };
        let done = self.in_pause(machine, at, transition, &mut meter, make);
        self.pauses.merge(&meter);
        transition.pauses.merge(&meter);
        let step = match done {
            Ok(mut step) => {
                if step.unmoved.is_some() {
                    transition.unmoved = step.unmoved.take();
                }
                step
            }
            Err(StepError::Fail(error)) => return Err(StepError::Fail(self.lost(error))),
            Err(busy) => return Err(busy),
        };
        if let Some(start) = step.wake {
            // The list is out: whatever comes to it first works it off, the next tick at the latest.
            if let Err(error) = machine.interrupt(start.vcpu, start.vector) {
                tracing::warn!(%error, "sleepers are woken later");
            }
        }
        Ok((step, Duration::from_micros(meter.longest_us)))
    }

    fn in_pause<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        transition: &Transition,
        meter: &mut PauseReport,
        make: impl FnOnce(&StepContext<'_>) -> Result<Step, StepError>,
    ) -> Result<Step, StepError> {
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let facts = guest.facts()?.clone();
        let patch = self.patches.get(at).ok_or_else(not_found)?;
        if self.walks_in_the_pause {
            guest.task_cache = TaskCache::new();
        } else {
            guest.walk_ahead(machine.memory(), &transition.direction.watch(patch));
        }
        let signals = transition.signals();
        let mut paused = PauseGuard::begin(machine, meter)?;
        let mut mapping = crate::memory::write_batch::WriteBatch::new();
        let (step, tasks, walked) = {
            let look = guest.look(paused.memory(), &paused.vcpus)?;
            self.places.plan_mapping(&look.memory, &mut mapping)?;
            let scene = StepContext {
                look: &look,
                facts: &facts,
                places: &self.places,
                dummy: self.places.known_dummy(),
                patch,
                alone: self.patches.len() == 1,
                signal: self.waker.as_ref().filter(|_| signals),
                unmoved: transition.unmoved.as_ref(),
            };
            let step = make(&scene);
            (step, look.cached().len(), look.walked())
        };
        paused.saw(tasks, walked);
        let step = step?;
        let mapped = paused.commit(&mapping)?;
        let reached = self
            .places
            .check_mapping(&guest.kernel.memory(paused.memory()));
        let written = match reached.and_then(|()| paused.commit(&step.plan)) {
            Ok(written) => written,
            Err(error) => return Err(paused.undo(&mapped, error).into()),
        };
        // Before the guest runs: its own wakeups send no interrupt to a CPU whose idle task has TIF_NEED_RESCHED already
        // (`kernel/sched/core.c: resched_curr`), which would sleep on without ours.
        let mut nudges = step.nudge.iter();
        if let Err(error) = nudges.try_for_each(|vcpu| paused.interrupt(*vcpu, RESCHEDULE_VECTOR)) {
            let error = paused.undo(&written, error.into());
            return Err(paused.undo(&mapped, error).into());
        }
        self.places.mapped();
        if let (Some(waker), Some(_)) = (&mut self.waker, step.wake) {
            waker.used = true;
        }
        if let Err(error) = paused.resume() {
            // What was written stands; the machine says the rest with its next answer.
            tracing::error!(%error, "the guest could not be resumed");
        }
        Ok(step)
    }
}
