//! Plans one step of a transition from a view of the paused guest.
//!
//! Each of the four steps ([`start`](StepContext::start),
//! [`try_complete`](StepContext::try_complete),
//! [`force`](StepContext::force), [`reverse`](StepContext::reverse)) has its counterpart in
//! `kernel/livepatch/transition.c`. It yields a [`Step`]: the writes to make in that same pause,
//! and the outcome for each task. None of them writes. Between two steps the guest itself switches
//! tasks: its entry code and idle loop switch tasks that carry TIF_PATCH_PENDING to
//! `klp_target_state`, and forked tasks inherit the state of their parent.
//!
//! The parts of a step are in [`step_checks`](crate::transition::step_checks) and
//! [`writes`](crate::transition::writes).

use introspect::{Gva, Task};

use crate::call::irq_work::Kick;
use crate::call::wake::{self, TaskWaker};
use crate::error::StepError;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::view::GuestView;
use crate::livepatch::direction::Direction;
use crate::livepatch::func::PatchedFunction;
use crate::livepatch::patch::Patch;
use crate::memory::PatchMemory;
use crate::memory::grace_period::GracePeriod;
use crate::memory::write_batch::WriteBatch;
use crate::report::task::SwitchedBy;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::preconditions::{self, NO_STATE};
use crate::transition::progress::Outcome;
use crate::transition::signal;

/// What to do in the pause of one step, and what the step found.
#[derive(Debug)]
pub struct Step {
    /// The writes to make in this pause, in their order.
    pub writes: WriteBatch,
    /// The outcome for each task of the view.
    pub outcomes: Vec<Outcome>,
    /// These writes complete the transition.
    pub finished: bool,
    /// The vCPUs to send a reschedule interrupt, which they take once the guest runs.
    pub reschedule: Vec<u32>,
    /// The interrupt that wakes sleeping tasks, to send once the guest runs.
    pub wake: Option<Kick>,
    /// The tasks that have not switched after these writes, in a guest that keeps no patch states.
    pub pending: Option<PendingTasks>,
    /// What must have passed before the memory that this step frees is used again.
    pub grace_period: Option<GracePeriod>,
}

impl Step {
    fn new(outcomes: Vec<Outcome>) -> Step {
        Step {
            writes: WriteBatch::new(),
            outcomes,
            finished: false,
            reschedule: Vec::new(),
            wake: None,
            pending: None,
            grace_period: None,
        }
    }
}

/// What every step needs: the paused guest, its kernel, and the patch in transition.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// The paused guest.
    pub view: &'a GuestView<'a>,
    /// What patching needs of its kernel.
    pub info: &'a KernelInfo,
    /// The guest memory of the patches.
    pub patch_memory: &'a PatchMemory,
    /// The dummy patch for `klp_transition_patch`; `None` in a guest without livepatching.
    pub dummy: Option<Gva>,
    /// The patch in transition.
    pub patch: &'a Patch,
    /// No other patch of outpatch is in the guest.
    pub is_only_patch: bool,
    /// Wakes sleeping tasks, if tasks that have not switched are sent the fake signal in this step.
    pub waker: Option<&'a TaskWaker>,
    /// The tasks that have not switched, in a guest that keeps no patch states.
    pub pending: Option<&'a PendingTasks>,
}

impl StepContext<'_> {
    /// Starts the transition (`klp_init_transition`, `klp_start_transition`) and makes the first
    /// attempt to complete it. Every task that can be switched in this pause is, and the others are
    /// marked for the guest's own code to switch. If all can be switched, no task ever sees a
    /// transition; `in_one_pause` requires that.
    ///
    /// # Errors
    /// [`StepError`], with nothing to be written.
    pub fn start(&self, direction: Direction, in_one_pause: bool) -> Result<Step, StepError> {
        let before = self.transition_patch(direction.opposite());
        if let Some(klp) = &self.info.klp {
            preconditions::check_no_transition(&self.view.memory, klp, before.unwrap_or_default())?;
        }
        self.check_text()?;
        self.check_patch_states()?;
        self.check_sites_before(direction)?;
        self.check_unused(direction)?;
        if direction == Direction::Apply {
            self.patch_memory.check(&self.view.memory)?;
        }
        let checks = self.check_stacks(direction, |_| true);
        let can_complete = checks.are_clear()
            && self.view.check_vcpus_have_tasks().is_ok()
            && self.check_replaced_code().is_ok();
        if !can_complete && in_one_pause {
            return Err(self.not_at_once(&checks));
        }
        if can_complete {
            let mut step = Step::new(checks.into_outcomes());
            self.plan_code(direction, &mut step.writes);
            self.plan_completion(direction, &mut step.writes)?;
            self.plan_registration(direction, (true, true), &mut step)?;
            let patch = self.transition_patch(direction);
            self.plan_klp_variables(NO_STATE, patch, &mut step.writes)?;
            step.finished = true;
            return Ok(step);
        }
        let mut step = Step::new(Vec::new());
        self.plan_code(direction, &mut step.writes);
        self.plan_registration(direction, (true, false), &mut step)?;
        self.plan_klp_variables(direction.target(), self.dummy, &mut step.writes)?;
        for (at, task) in self.view.tasks().enumerate() {
            if checks.is_clear(at) {
                self.plan_state(task, direction.target(), &mut step.writes)?;
            } else {
                self.plan_state(task, direction.initial(), &mut step.writes)?;
                self.plan_pending_flag(task, true, &mut step.writes)?;
            }
        }
        let pending = self.addresses_of(|at| !checks.is_clear(at));
        self.plan_pending_table(direction, pending, &mut step)?;
        self.plan_sites(&mut step.writes, PatchedFunction::to_stub)?;
        step.outcomes = checks.into_outcomes();
        self.plan_reschedule(&mut step);
        Ok(step)
    }

    /// Tries to complete the transition (`klp_try_complete_transition`): switches the tasks that
    /// can be switched now, and completes the transition if all have switched.
    ///
    /// # Errors
    /// [`StepError`], with nothing to be written.
    pub fn try_complete(&self, direction: Direction) -> Result<Step, StepError> {
        self.check_our_transition(direction)?;
        let target = direction.target();
        let checks = self.check_stacks(direction, |state| state != target);
        let mut step = Step::new(self.outcomes(&checks, target, None));
        if step.outcomes.iter().all(has_switched) {
            match self.can_complete(direction) {
                Ok(()) => {
                    self.plan_idle_states(&mut step.writes)?;
                    self.plan_completion(direction, &mut step.writes)?;
                    self.plan_registration(direction, (false, true), &mut step)?;
                    let patch = self.transition_patch(direction);
                    self.plan_klp_variables(NO_STATE, patch, &mut step.writes)?;
                    step.finished = true;
                    return Ok(step);
                }
                Err(StepError::Busy(why)) => {
                    tracing::debug!(why, "the transition cannot be completed yet");
                }
                Err(failed) => return Err(failed),
            }
        }
        for (at, task) in self.view.tasks().enumerate() {
            if self.state(at) == target {
                continue;
            }
            if checks.is_clear(at) {
                self.plan_state(task, target, &mut step.writes)?;
                self.plan_pending_flag(task, false, &mut step.writes)?;
            } else {
                self.plan_thread_flags(task, true, self.signal_flag(task), &mut step.writes)?;
            }
        }
        let switched = self.addresses_of(|at| checks.is_clear(at));
        self.plan_pending_removal(switched, &mut step)?;
        self.plan_wakeups(&mut step)?;
        self.plan_reschedule(&mut step);
        Ok(step)
    }

    /// Switches every task, wherever it is (`klp_force_transition`).
    ///
    /// # Errors
    /// [`StepError`], with nothing to be written.
    pub fn force(&self, direction: Direction) -> Result<Step, StepError> {
        self.check_our_transition(direction)?;
        // A vCPU that is updating `patch_state`, or copying it to a child, must finish first.
        self.view.check_no_vcpu_in(&self.switching_code())?;
        let target = direction.target();
        let outcome = |at| match self.state(at) == target {
            true => Outcome::Switched(None),
            false => Outcome::Switched(Some(SwitchedBy::Forced)),
        };
        let mut step = Step::new((0..self.view.cached().len()).map(outcome).collect());
        for (at, task) in self.view.tasks().enumerate() {
            if self.state(at) != target {
                self.plan_state(task, target, &mut step.writes)?;
                self.plan_pending_flag(task, false, &mut step.writes)?;
            }
        }
        self.plan_pending_removal(self.addresses_of(|_| true), &mut step)?;
        Ok(step)
    }

    /// Reverses the running transition (`klp_reverse_transition`): tasks that have switched are to
    /// switch back.
    ///
    /// # Errors
    /// [`StepError`], with nothing to be written.
    pub fn reverse(&self, from: Direction, to: Direction) -> Result<Step, StepError> {
        self.check_our_transition(from)?;
        // A vCPU that is storing the old target would store it after these writes.
        self.view.check_no_vcpu_in(&self.switching_code())?;
        let target = to.target();
        let checks = self.check_stacks(to, |state| state != target);
        let mut step = Step::new(self.outcomes(&checks, target, Some(SwitchedBy::NotSwitched)));
        self.plan_klp_variables(target, self.dummy, &mut step.writes)?;
        for (at, task) in self.view.tasks().enumerate() {
            let clear = checks.is_clear(at);
            if clear && self.state(at) != target {
                self.plan_state(task, target, &mut step.writes)?;
            }
            self.plan_pending_flag(task, !clear, &mut step.writes)?;
        }
        let pending = self.addresses_of(|at| !checks.is_clear(at));
        self.plan_pending_table(to, pending, &mut step)?;
        self.plan_reschedule(&mut step);
        Ok(step)
    }

    /// What `klp_transition_patch` is when a transition in this direction is completed. As long as
    /// a patch of outpatch is in the guest, the guest's own livepatching gets -EBUSY: a livepatch
    /// of the guest's for a function that outpatch patches would have no effect, as ftrace leaves
    /// that entry alone, and nothing would report it.
    fn transition_patch(&self, direction: Direction) -> Option<Gva> {
        match direction {
            Direction::Revert if self.is_only_patch => None,
            _ => self.dummy,
        }
    }

    /// The addresses of the tasks whose numbers in the view are `wanted`.
    fn addresses_of(&self, wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = Gva> {
        let each = self.view.tasks().enumerate();
        each.filter(move |(at, _)| wanted(*at))
            .map(|(_, task)| task.addr)
    }

    /// The thread flag of the fake signal, if `task` is sent one (`klp_send_signals`).
    fn signal_flag(&self, task: &Task) -> u64 {
        let flag = self.info.tif.notify_signal.unwrap_or_default();
        let sent = self.waker.is_some() && signal::action_for(task).flag;
        if sent { flag } else { 0 }
    }

    /// Plans the waking of sleeping tasks that have not switched, and marks the tasks that are
    /// signalled in this step.
    fn plan_wakeups(&self, step: &mut Step) -> Result<(), StepError> {
        let Some(waker) = self.waker else {
            return Ok(());
        };
        let memory = &self.view.memory;
        // The guest works on one list of tasks to wake at a time.
        let idle = waker.is_idle(memory)?;
        let mut sleepers = Vec::new();
        for (at, task) in self.view.tasks().enumerate() {
            let Some(Outcome::Blocked(blocked)) = step.outcomes.get_mut(at) else {
                continue;
            };
            blocked.signalled = self.signal_flag(task) & !task.tif != 0;
            if signal::action_for(task).wake && idle && sleepers.len() < wake::MAX_TASKS {
                sleepers.push((at, task));
            }
        }
        if sleepers.is_empty() {
            return Ok(());
        }
        let tasks: Vec<&Task> = sleepers.iter().map(|(_, task)| *task).collect();
        step.wake = waker.plan(self.view, self.patch_memory, &tasks, &mut step.writes)?;
        if step.wake.is_some() {
            for (at, _) in sleepers {
                if let Some(Outcome::Blocked(blocked)) = step.outcomes.get_mut(at) {
                    blocked.signalled = true;
                }
            }
        }
        Ok(())
    }

    /// Plans a reschedule interrupt for each vCPU that runs a task which has not switched: it sends
    /// a vCPU in user mode through the kernel exit, and an idle one through the idle loop.
    fn plan_reschedule(&self, step: &mut Step) {
        let each = self.view.tasks().zip(&step.outcomes);
        step.reschedule = each
            .filter(|(_, outcome)| matches!(outcome, Outcome::Blocked(_)))
            .filter_map(|(task, _)| self.view.vcpu_of(task))
            .filter(|vcpu| vcpu.online)
            .map(|vcpu| vcpu.index)
            .collect();
    }
}

fn has_switched(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Switched(_))
}
