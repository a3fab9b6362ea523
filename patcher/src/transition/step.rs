//! One look at a paused guest in a transition, and what it comes to.
//!
//! Each function here is given one look at a paused guest and yields a [`Step`]: the writes to carry out in that same pause, and
//! what to enter in the book. None of them writes. What happens between two looks is the guest's own doing: its entry code and idle
//! loop flip tasks that carry TIF_PATCH_PENDING to `klp_target_state`, and its forks inherit.

use introspect::task_list::cache::CachedTask;
use introspect::{PatchState, Task};

use crate::call::irq_work::Kick;
use crate::call::wake::{self, TaskWaker};
use crate::error::PatchError;
use crate::error::StepError;
use crate::ftrace::site::SiteError;
use crate::guest::code_set::CodeSet;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::view::{GuestView, StackCheck};
use crate::livepatch::direction::Direction;
use crate::livepatch::func::PatchedFunction;
use crate::livepatch::patch::Patch;
use crate::memory::PatchMemory;
use crate::memory::write_batch::WriteBatch;
use crate::report::task::SwitchedBy;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::preconditions::{self, NO_STATE};
use crate::transition::progress::Outcome;
use crate::transition::signal;
use crate::transition::stack_checks::StackChecks;
use crate::x86::{self, SITE_LEN};

/// What to do in the pause of one look, and what it found.
#[derive(Debug)]
pub struct Step {
    /// The writes.
    pub plan: WriteBatch,
    /// For each task of the look.
    pub outcomes: Vec<Outcome>,
    /// With these writes the transition is over.
    pub finished: bool,
    /// vCPUs to send a reschedule interrupt, which they take once the guest runs.
    pub reschedule: Vec<u32>,
    /// The interrupt that wakes sleepers, to send once it does.
    pub wake: Option<Kick>,
    /// Who has not moved then, in a guest that does not know it itself.
    pub pending: Option<PendingTasks>,
}

/// The guest, what is known of it, and the patch: what every step needs.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// The look.
    pub view: &'a GuestView<'a>,
    /// The kernel.
    pub info: &'a KernelInfo,
    /// Where things lie.
    pub patch_memory: &'a PatchMemory,
    /// The stand-in for `klp_transition_patch`, where there is such a thing.
    pub dummy: Option<introspect::Gva>,
    /// The patch.
    pub patch: &'a Patch,
    /// No other patch of ours is in the guest.
    pub alone: bool,
    /// Those who keep the old state are sent the fake signal, and this wakes the sleepers among them.
    pub signal: Option<&'a TaskWaker>,
    /// Who has not moved, in a transition of a guest that does not know it itself.
    pub pending: Option<&'a PendingTasks>,
}

impl<'a> StepContext<'a> {
    /// Begins the transition: everybody who can be moved in this very pause is, and the rest is marked for the guest's own code
    /// to move. When nobody is left, no task ever sees a transition at all; `in_one_pause` wants that or nothing.
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn start(&self, direction: Direction, in_one_pause: bool) -> Result<Step, StepError> {
        let before = self.transition_patch(direction.back());
        if let Some(klp) = &self.info.klp {
            preconditions::check_no_transition(&self.view.memory, klp, before.unwrap_or_default())?;
        }
        self.check_text()?;
        self.check_patch_states()?;
        self.check_sites_before(direction)?;
        if direction == Direction::Apply {
            self.patch_memory
                .check(&self.view.memory, self.patch.code)?;
        }
        let checks = self.checks(direction, |_| true);
        let at_last = checks.are_clear()
            && self.view.every_vcpu_has_a_task().is_ok()
            && self.check_replaced_code().is_ok();
        if !at_last && in_one_pause {
            return Err(self.not_at_once(&checks));
        }
        if at_last {
            let mut step = Step::new(checks.into_outcomes());
            self.plan_code(direction, &mut step.plan)?;
            self.plan_end(direction, &mut step.plan)?;
            self.plan_globals(NO_STATE, self.transition_patch(direction), &mut step.plan)?;
            step.finished = true;
            return Ok(step);
        }
        let mut step = Step::new(Vec::new());
        self.plan_code(direction, &mut step.plan)?;
        self.plan_globals(direction.target(), self.dummy, &mut step.plan)?;
        for (at, task) in self.view.tasks().enumerate() {
            if checks.is_clear(at) {
                self.plan_state(task, direction.target(), &mut step.plan)?;
            } else {
                self.plan_state(task, direction.initial(), &mut step.plan)?;
                self.plan_pending(task, true, &mut step.plan)?;
            }
        }
        let pending = self.addresses_of(|at| !checks.is_clear(at));
        self.plan_pending_tasks(direction, pending, &mut step)?;
        self.plan_sites(&mut step.plan, PatchedFunction::to_stub)?;
        step.outcomes = checks.into_outcomes();
        self.reschedule(&mut step);
        Ok(step)
    }

    /// Goes on: moves those who can be moved now, and ends the transition when nobody is left.
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn try_complete(&self, direction: Direction) -> Result<Step, StepError> {
        self.check_ours(direction)?;
        let target = direction.target();
        let checks = self.checks(direction, |state| state != target);
        let mut step = Step::new(self.outcomes(&checks, target, None));
        if step.outcomes.iter().all(is_there) {
            match self.can_complete(direction) {
                Ok(()) => {
                    self.plan_states_idle(&mut step.plan)?;
                    self.plan_end(direction, &mut step.plan)?;
                    let patch = self.transition_patch(direction);
                    self.plan_globals(NO_STATE, patch, &mut step.plan)?;
                    step.finished = true;
                    return Ok(step);
                }
                Err(StepError::Busy(why)) => tracing::debug!(why, "the transition cannot end yet"),
                Err(fail) => return Err(fail),
            }
        }
        for (at, task) in self.view.tasks().enumerate() {
            if self.state(at) == target {
                continue;
            }
            if checks.is_clear(at) {
                self.plan_state(task, target, &mut step.plan)?;
                self.plan_pending(task, false, &mut step.plan)?;
            } else {
                self.plan_flags(task, true, self.signal_flag(task), &mut step.plan)?;
            }
        }
        let moved = self.addresses_of(|at| checks.is_clear(at));
        self.plan_switched(moved, &mut step)?;
        self.wake_sleepers(&mut step)?;
        self.reschedule(&mut step);
        Ok(step)
    }

    /// The flag of the fake signal, if `task` is sent one ([`signal`]).
    fn signal_flag(&self, task: &Task) -> u64 {
        let flag = self.info.tif.notify_signal.unwrap_or_default();
        let sent = self.signal.is_some() && signal::call(task).flag;
        if sent { flag } else { 0 }
    }

    /// Has the sleepers among those who keep the old state woken, and notes who is signalled in this look.
    fn wake_sleepers(&self, step: &mut Step) -> Result<(), StepError> {
        let Some(waker) = self.signal else {
            return Ok(());
        };
        let memory = &self.view.memory;
        // One list of sleepers is out at a time.
        let idle = waker.is_idle(memory)?;
        let mut sleepers = Vec::new();
        for (at, task) in self.view.tasks().enumerate() {
            let Some(Outcome::Blocked(blocked)) = step.outcomes.get_mut(at) else {
                continue;
            };
            blocked.signalled = self.signal_flag(task) & !task.tif != 0;
            if signal::call(task).wake && idle && sleepers.len() < wake::MAX_TASKS {
                sleepers.push((at, task));
            }
        }
        if sleepers.is_empty() {
            return Ok(());
        }
        let tasks: Vec<&Task> = sleepers.iter().map(|(_, task)| *task).collect();
        step.wake = waker.plan(self.view, self.patch_memory, &tasks, &mut step.plan)?;
        if step.wake.is_some() {
            for (at, _) in sleepers {
                if let Some(Outcome::Blocked(blocked)) = step.outcomes.get_mut(at) {
                    blocked.signalled = true;
                }
            }
        }
        Ok(())
    }

    /// Moves everybody, wherever they are (`kernel/livepatch/transition.c: klp_force_transition`).
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn force(&self, direction: Direction) -> Result<Step, StepError> {
        self.check_ours(direction)?;
        // Whoever is just storing a state, or handing it to a child, is let finish.
        self.view.no_vcpu_in(&self.switching())?;
        let target = direction.target();
        let moved = |at| match self.state(at) == target {
            true => Outcome::Switched(None),
            false => Outcome::Switched(Some(SwitchedBy::Forced)),
        };
        let mut step = Step::new((0..self.view.cached().len()).map(moved).collect());
        for (at, task) in self.view.tasks().enumerate() {
            if self.state(at) != target {
                self.plan_state(task, target, &mut step.plan)?;
                self.plan_pending(task, false, &mut step.plan)?;
            }
        }
        self.plan_switched(self.addresses_of(|_| true), &mut step)?;
        Ok(step)
    }

    /// Somebody is in the way of moving all in this pause. Whoever is in the old code is named rather than one of whom that is not
    /// known: the latter has often gone on by the next pause.
    fn not_at_once(&self, checks: &StackChecks) -> StepError {
        let (mut inside, mut unsure) = (Vec::new(), Vec::new());
        for (at, check) in checks.not_clear() {
            let Some(CachedTask { task, .. }) = self.view.cached().get(at) else {
                continue;
            };
            match check {
                StackCheck::Clear(_) => {}
                StackCheck::Blocked(why) => inside.push((task, why)),
                StackCheck::Unknown(why) => unsure.push((task, why)),
            }
        }
        let mut blocked = inside.into_iter().chain(unsure);
        match blocked.next() {
            Some((task, why)) => StepError::Failed(PatchError::NotAtOnce {
                blocker: format!("{} {} {why}", task.pid, task.comm),
                others: blocked.count(),
            }),
            None => StepError::Busy("a vCPU is between two tasks".into()),
        }
    }

    /// Turns a running transition round, as `klp_reverse_transition` does: those who have moved are to move back.
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn reverse(&self, from: Direction, to: Direction) -> Result<Step, StepError> {
        self.check_ours(from)?;
        // Whoever is just storing the old target would store it after us.
        self.view.no_vcpu_in(&self.switching())?;
        let target = to.target();
        let checks = self.checks(to, |state| state != target);
        let mut step = Step::new(self.outcomes(&checks, target, Some(SwitchedBy::NotSwitched)));
        self.plan_globals(target, self.dummy, &mut step.plan)?;
        for (at, task) in self.view.tasks().enumerate() {
            let clean = checks.is_clear(at);
            if clean && self.state(at) != target {
                self.plan_state(task, target, &mut step.plan)?;
            }
            self.plan_pending(task, !clean, &mut step.plan)?;
        }
        let pending = self.addresses_of(|at| !checks.is_clear(at));
        self.plan_pending_tasks(to, pending, &mut step)?;
        self.reschedule(&mut step);
        Ok(step)
    }

    /// What `klp_transition_patch` is when a transition in this direction is over: as long as a patch of ours is in the guest, its
    /// own livepatching gets -EBUSY. A livepatch of the guest's for a function that we serve would be without effect, as ftrace leaves
    /// that entry alone, and nobody would be told.
    fn transition_patch(&self, direction: Direction) -> Option<introspect::Gva> {
        match direction {
            Direction::Revert if self.alone => None,
            _ => self.dummy,
        }
    }

    /// The transition is the one we began, and the entries are as we left them.
    fn check_ours(&self, direction: Direction) -> Result<(), StepError> {
        let memory = &self.view.memory;
        if let (Some(klp), Some(dummy)) = (&self.info.klp, self.dummy) {
            preconditions::check_our_transition(memory, klp, direction.target(), dummy)?;
        }
        self.check_sites(|function| Ok(function.to_stub()?))
    }

    fn check_text(&self) -> Result<(), StepError> {
        preconditions::check_locks(&self.view.memory, self.info)?;
        preconditions::check_text_poke(self.view.kernel, &self.view.memory, self.info)
    }

    fn check_patch_states(&self) -> Result<(), StepError> {
        let other = |(at, _): &(usize, &Task)| self.state(*at) != NO_STATE;
        match self.view.tasks().enumerate().find(other) {
            None => Ok(()),
            Some((_, task)) => Err(StepError::Busy(format!(
                "{} ({}) has a patch state already",
                task.comm, task.pid
            ))),
        }
    }

    fn check_sites_before(&self, direction: Direction) -> Result<(), StepError> {
        match direction {
            Direction::Apply => self.check_sites(|function| Ok(function.to_previous()?)),
            Direction::Revert => self.check_sites(|function| Ok(function.to_new()?)),
        }
    }

    fn check_sites(
        &self,
        expected: impl Fn(&PatchedFunction) -> Result<[u8; SITE_LEN], PatchError>,
    ) -> Result<(), StepError> {
        let (memory, types) = (&self.view.memory, &self.info.ftrace);
        for function in &self.patch.functions {
            let site = &function.site;
            let bytes = match function.superseded_by {
                Some(newer) => x86::jump(site.at, newer).map_err(PatchError::from)?,
                None => expected(function)?,
            };
            let disabled = bytes != site.nop;
            let as_expected = site.holds(memory, bytes)?
                && site.is_disabled(memory, types)? == disabled
                && (disabled || !site.has_users(memory, types)?);
            if !as_expected {
                return Err(StepError::Failed(PatchError::Site {
                    function: function.name.clone(),
                    at: site.at,
                    source: SiteError::Changed,
                }));
            }
        }
        Ok(())
    }

    /// The tasks of these numbers of the look.
    fn addresses_of(&self, which: impl Fn(usize) -> bool) -> impl Iterator<Item = introspect::Gva> {
        let each = self.view.tasks().enumerate();
        each.filter(move |(at, _)| which(*at))
            .map(|(_, task)| task.addr)
    }

    /// The patch state of task number `at` of the look.
    fn state(&self, at: usize) -> i32 {
        match (self.pending, self.view.cached().get(at)) {
            (Some(pending), Some(seen)) if pending.contains(seen.task.addr) => {
                pending.direction().initial()
            }
            (Some(pending), _) => pending.direction().target(),
            (None, _) => number(self.view.patch_state(at)),
        }
    }

    /// Where each task stands; those of whose state `ask` does not want to know are taken to be clean.
    fn checks(&self, direction: Direction, ask: impl Fn(i32) -> bool) -> StackChecks {
        let codes = self.patch.code_to_leave(direction);
        let stand = |at| match self.view.patch_state(at) {
            _ if !ask(self.state(at)) => StackCheck::Clear(SwitchedBy::Stack),
            Some(PatchState::Invalid(state)) => StackCheck::Unknown(format!(
                "its patch_state is {state}, which no kernel writes"
            )),
            _ => self.view.check(at, &codes),
        };
        StackChecks::ask(self.view.cached().len(), stand)
    }

    /// What to enter for each task, where those in state `target` got there by `way`.
    fn outcomes(
        &self,
        checks: &StackChecks,
        target: i32,
        switched_by: Option<SwitchedBy>,
    ) -> Vec<Outcome> {
        let mut outcomes = checks.clone().into_outcomes();
        for (at, outcome) in outcomes.iter_mut().enumerate() {
            if self.state(at) == target {
                *outcome = Outcome::Switched(switched_by);
            }
        }
        outcomes
    }

    /// Code in which a task's state and flag are being changed.
    fn switching(&self) -> CodeSet {
        let mut codes = CodeSet::new();
        for (code, name) in self.info.klp.iter().flat_map(|klp| &klp.switching) {
            codes.add(*code, *name);
        }
        codes
    }

    /// Everybody is there. Is nobody in code that must not be pulled away?
    fn can_complete(&self, direction: Direction) -> Result<(), StepError> {
        self.view.every_vcpu_has_a_task()?;
        self.view.no_vcpu_in(&self.switching())?;
        if direction == Direction::Revert && self.patch.forced {
            // Whoever is in the new code may stay: it is not taken away.
            self.check_text()?;
        } else if direction == Direction::Apply {
            self.check_replaced_code()?;
        } else {
            // A task that has moved can still be in a stub, on its way to the old function.
            self.view.no_task_in(&self.patch.new_code())?;
            self.check_text()?;
        }
        Ok(())
    }

    /// Nobody is in the code of patches that go with this one's coming.
    fn check_replaced_code(&self) -> Result<(), StepError> {
        if self.patch.replaces.is_empty() {
            return Ok(());
        }
        self.view.no_task_in(&self.patch.replaced_code())?;
        self.check_text()
    }

    /// A reschedule interrupt sends a vCPU in user mode through the kernel's exit path, and an idle one round its loop.
    fn reschedule(&self, step: &mut Step) {
        let waiting = self.view.tasks().zip(&step.outcomes);
        step.reschedule = waiting
            .filter(|(_, outcome)| matches!(outcome, Outcome::Blocked(_)))
            .filter_map(|(task, _)| self.view.vcpu_of(task))
            .filter(|vcpu| vcpu.online)
            .map(|vcpu| vcpu.index)
            .collect();
    }
}

impl Step {
    fn new(outcomes: Vec<Outcome>) -> Step {
        Step {
            plan: WriteBatch::new(),
            outcomes,
            finished: false,
            reschedule: Vec::new(),
            wake: None,
            pending: None,
        }
    }
}

/// The patch state as a number; `NO_STATE` in a kernel that has none.
fn number(state: Option<PatchState>) -> i32 {
    match state {
        None | Some(PatchState::Idle) => NO_STATE,
        Some(PatchState::Unpatched) => 0,
        Some(PatchState::Patched) => 1,
        Some(PatchState::Invalid(other)) => other,
    }
}

fn is_there(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Switched(_))
}
