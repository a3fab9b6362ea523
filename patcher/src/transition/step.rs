//! One look at a paused guest in a transition, and what it comes to.
//!
//! Each function here is given one look at a paused guest and yields a [`Step`]: the writes to carry out in that same pause, and
//! what to enter in the book. None of them writes. What happens between two looks is the guest's own doing: its entry code and idle
//! loop flip tasks that carry TIF_PATCH_PENDING to `klp_target_state`, and its forks inherit.

use introspect::task_list::CachedTask;
use introspect::{PatchState, Task};

use crate::call::wake::{self, Kick, TaskWaker};
use crate::error::PatchError;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::view::{CodeSet, GuestView, StackCheck};
use crate::livepatch::func_stack::PatchedFunction;
use crate::livepatch::patch::Patch;
use crate::memory::PatchMemory;
use crate::memory::write_batch::WriteBatch;
use crate::report::patch::SwitchedBy;
use crate::transition::Direction;
use crate::transition::pending_tasks::PendingTasks;
use crate::transition::preconditions::{self, NO_STATE, StepError};
use crate::transition::progress::Outcome;
use crate::transition::signal;
use crate::transition::stack_checks::StackChecks;
use crate::x86::entry_stub::{self, EncodeError, SITE_LEN};

/// What to do in the pause of one look, and what it found.
#[derive(Debug)]
pub struct Step {
    /// The writes.
    pub plan: WriteBatch,
    /// For each task of the look.
    pub findings: Vec<Outcome>,
    /// With these writes the transition is over.
    pub finished: bool,
    /// vCPUs to send a reschedule interrupt, which they take once the guest runs.
    pub nudge: Vec<u32>,
    /// The interrupt that wakes sleepers, to send once it does.
    pub wake: Option<Kick>,
    /// Who has not moved then, in a guest that does not know it itself.
    pub unmoved: Option<PendingTasks>,
}

impl From<EncodeError> for PatchError {
    fn from(error: EncodeError) -> Self {
        PatchError::NoRoom(error.to_string())
    }
}

/// The guest, what is known of it, and the patch: what every step needs.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// The look.
    pub look: &'a GuestView<'a>,
    /// The kernel.
    pub facts: &'a KernelInfo,
    /// Where things lie.
    pub places: &'a PatchMemory,
    /// The stand-in for `klp_transition_patch`, where there is such a thing.
    pub dummy: Option<introspect::Gva>,
    /// The patch.
    pub patch: &'a Patch,
    /// No other patch of ours is in the guest.
    pub alone: bool,
    /// Those who keep the old state are sent the fake signal, and this wakes the sleepers among them.
    pub signal: Option<&'a TaskWaker>,
    /// Who has not moved, in a transition of a guest that does not know it itself.
    pub unmoved: Option<&'a PendingTasks>,
}

impl<'a> StepContext<'a> {
    /// Begins the transition: everybody who can be moved in this very pause is, and the rest is marked for the guest's own code
    /// to move. When nobody is left, no task ever sees a transition at all; `at_once` wants that or nothing.
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn begin(&self, direction: Direction, at_once: bool) -> Result<Step, StepError> {
        let before = self.transition_patch(direction.back());
        if let Some(klp) = &self.facts.klp {
            preconditions::no_transition(&self.look.memory, klp, before.unwrap_or_default())?;
        }
        self.text_is_still()?;
        self.no_states()?;
        self.sites_are_as_before(direction)?;
        if direction == Direction::Apply {
            self.places.check(&self.look.memory, self.patch.code)?;
        }
        let standings = self.standings(direction, |_| true);
        let at_last = standings.are_clean()
            && self.look.every_vcpu_has_a_task().is_ok()
            && self.replaced_are_left().is_ok();
        if !at_last && at_once {
            return Err(self.not_at_once(&standings));
        }
        if at_last {
            let mut step = Step::new(standings.into_findings());
            self.plan_code(direction, &mut step.plan)?;
            self.plan_end(direction, &mut step.plan)?;
            self.plan_globals(NO_STATE, self.transition_patch(direction), &mut step.plan)?;
            step.finished = true;
            return Ok(step);
        }
        let mut step = Step::new(Vec::new());
        self.plan_code(direction, &mut step.plan)?;
        self.plan_globals(direction.target(), self.dummy, &mut step.plan)?;
        for (at, task) in self.look.tasks().enumerate() {
            if standings.is_clean(at) {
                self.plan_state(task, direction.target(), &mut step.plan)?;
            } else {
                self.plan_state(task, direction.initial(), &mut step.plan)?;
                self.plan_pending(task, true, &mut step.plan)?;
            }
        }
        let unmoved = self.those(|at| !standings.is_clean(at));
        self.plan_unmoved(direction, unmoved, &mut step)?;
        self.plan_sites(&mut step.plan, PatchedFunction::to_stub)?;
        step.findings = standings.into_findings();
        self.nudge(&mut step);
        Ok(step)
    }

    /// Goes on: moves those who can be moved now, and ends the transition when nobody is left.
    ///
    /// # Errors
    /// [`StepError`]; nothing is to be written.
    pub fn go_on(&self, direction: Direction) -> Result<Step, StepError> {
        self.is_ours(direction)?;
        let target = direction.target();
        let standings = self.standings(direction, |state| state != target);
        let mut step = Step::new(self.findings(&standings, target, None));
        if step.findings.iter().all(is_there) {
            match self.may_end(direction) {
                Ok(()) => {
                    self.plan_no_states(&mut step.plan)?;
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
        for (at, task) in self.look.tasks().enumerate() {
            if self.state(at) == target {
                continue;
            }
            if standings.is_clean(at) {
                self.plan_state(task, target, &mut step.plan)?;
                self.plan_pending(task, false, &mut step.plan)?;
            } else {
                self.plan_flags(task, true, self.signal_flag(task), &mut step.plan)?;
            }
        }
        let moved = self.those(|at| standings.is_clean(at));
        self.plan_moved(moved, &mut step)?;
        self.wake_sleepers(&mut step)?;
        self.nudge(&mut step);
        Ok(step)
    }

    /// The flag of the fake signal, if `task` is sent one ([`signal`]).
    fn signal_flag(&self, task: &Task) -> u64 {
        let flag = self.facts.tif.notify_signal.unwrap_or_default();
        let sent = self.signal.is_some() && signal::call(task).flag;
        if sent { flag } else { 0 }
    }

    /// Has the sleepers among those who keep the old state woken, and notes who is signalled in this look.
    fn wake_sleepers(&self, step: &mut Step) -> Result<(), StepError> {
        let Some(waker) = self.signal else {
            return Ok(());
        };
        let memory = &self.look.memory;
        // One list of sleepers is out at a time.
        let idle = waker.is_idle(memory)?;
        let mut sleepers = Vec::new();
        for (at, task) in self.look.tasks().enumerate() {
            let Some(Outcome::Blocked(blocked)) = step.findings.get_mut(at) else {
                continue;
            };
            blocked.signalled = self.signal_flag(task) & !task.tif != 0;
            if signal::call(task).wake && idle && sleepers.len() < wake::MOST {
                sleepers.push((at, task));
            }
        }
        if sleepers.is_empty() {
            return Ok(());
        }
        let tasks: Vec<&Task> = sleepers.iter().map(|(_, task)| *task).collect();
        step.wake = waker.plan(self.look, self.places, &tasks, &mut step.plan)?;
        if step.wake.is_some() {
            for (at, _) in sleepers {
                if let Some(Outcome::Blocked(blocked)) = step.findings.get_mut(at) {
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
        self.is_ours(direction)?;
        // Whoever is just storing a state, or handing it to a child, is let finish.
        self.look.no_vcpu_in(&self.switching())?;
        let target = direction.target();
        let moved = |at| match self.state(at) == target {
            true => Outcome::Switched(None),
            false => Outcome::Switched(Some(SwitchedBy::Forced)),
        };
        let mut step = Step::new((0..self.look.cached().len()).map(moved).collect());
        for (at, task) in self.look.tasks().enumerate() {
            if self.state(at) != target {
                self.plan_state(task, target, &mut step.plan)?;
                self.plan_pending(task, false, &mut step.plan)?;
            }
        }
        self.plan_moved(self.those(|_| true), &mut step)?;
        Ok(step)
    }

    /// Somebody is in the way of moving all in this pause. Whoever is in the old code is named rather than one of whom that is not
    /// known: the latter has often gone on by the next pause.
    fn not_at_once(&self, standings: &StackChecks) -> StepError {
        let (mut inside, mut unsure) = (Vec::new(), Vec::new());
        for (at, standing) in standings.unclean() {
            let Some(CachedTask { task, .. }) = self.look.cached().get(at) else {
                continue;
            };
            match standing {
                StackCheck::Clear(_) => {}
                StackCheck::Blocked(why) => inside.push((task, why)),
                StackCheck::Unknown(why) => unsure.push((task, why)),
            }
        }
        let mut blocked = inside.into_iter().chain(unsure);
        match blocked.next() {
            Some((task, why)) => StepError::Fail(PatchError::NotAtOnce {
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
    pub fn turn_round(&self, from: Direction, to: Direction) -> Result<Step, StepError> {
        self.is_ours(from)?;
        // Whoever is just storing the old target would store it after us.
        self.look.no_vcpu_in(&self.switching())?;
        let target = to.target();
        let standings = self.standings(to, |state| state != target);
        let mut step = Step::new(self.findings(&standings, target, Some(SwitchedBy::NotSwitched)));
        self.plan_globals(target, self.dummy, &mut step.plan)?;
        for (at, task) in self.look.tasks().enumerate() {
            let clean = standings.is_clean(at);
            if clean && self.state(at) != target {
                self.plan_state(task, target, &mut step.plan)?;
            }
            self.plan_pending(task, !clean, &mut step.plan)?;
        }
        let unmoved = self.those(|at| !standings.is_clean(at));
        self.plan_unmoved(to, unmoved, &mut step)?;
        self.nudge(&mut step);
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
    fn is_ours(&self, direction: Direction) -> Result<(), StepError> {
        let memory = &self.look.memory;
        if let (Some(klp), Some(dummy)) = (&self.facts.klp, self.dummy) {
            preconditions::our_transition(memory, klp, direction.target(), dummy)?;
        }
        self.sites_hold(|redirect| Ok(redirect.to_stub()?))
    }

    fn text_is_still(&self) -> Result<(), StepError> {
        preconditions::no_locks(&self.look.memory, self.facts)?;
        preconditions::no_poke(self.look.kernel, &self.look.memory, self.facts)
    }

    fn no_states(&self) -> Result<(), StepError> {
        let other = |(at, _): &(usize, &Task)| self.state(*at) != NO_STATE;
        match self.look.tasks().enumerate().find(other) {
            None => Ok(()),
            Some((_, task)) => Err(StepError::Busy(format!(
                "{} ({}) has a patch state already",
                task.comm, task.pid
            ))),
        }
    }

    fn sites_are_as_before(&self, direction: Direction) -> Result<(), StepError> {
        match direction {
            Direction::Apply => self.sites_hold(|redirect| Ok(redirect.to_below()?)),
            Direction::Revert => self.sites_hold(|redirect| Ok(redirect.to_new()?)),
        }
    }

    fn sites_hold(
        &self,
        expected: impl Fn(&PatchedFunction) -> Result<[u8; SITE_LEN], PatchError>,
    ) -> Result<(), StepError> {
        let (memory, types) = (&self.look.memory, &self.facts.ftrace);
        for redirect in &self.patch.redirects {
            let site = &redirect.site;
            let bytes = match redirect.covered_by {
                Some(newer) => entry_stub::jump(site.at, newer).map_err(PatchError::from)?,
                None => expected(redirect)?,
            };
            let fenced = bytes != site.nop;
            let as_expected = site.holds(memory, bytes)?
                && site.is_fenced(memory, types)? == fenced
                && (fenced || !site.is_wanted(memory, types)?);
            if !as_expected {
                return Err(StepError::Fail(PatchError::Site {
                    function: redirect.name.clone(),
                    at: site.at,
                    why: "somebody in the guest changed its entry or its ftrace record".into(),
                }));
            }
        }
        Ok(())
    }

    /// The tasks of these numbers of the look.
    fn those(&self, which: impl Fn(usize) -> bool) -> impl Iterator<Item = introspect::Gva> {
        let each = self.look.tasks().enumerate();
        each.filter(move |(at, _)| which(*at))
            .map(|(_, task)| task.addr)
    }

    /// The patch state of task number `at` of the look.
    fn state(&self, at: usize) -> i32 {
        match (self.unmoved, self.look.cached().get(at)) {
            (Some(unmoved), Some(seen)) if unmoved.contains(seen.task.addr) => {
                unmoved.direction().initial()
            }
            (Some(unmoved), _) => unmoved.direction().target(),
            (None, _) => number(self.look.patch_state(at)),
        }
    }

    /// Where each task stands; those of whose state `ask` does not want to know are taken to be clean.
    fn standings(&self, direction: Direction, ask: impl Fn(i32) -> bool) -> StackChecks {
        let watch = direction.watch(self.patch);
        let stand = |at| match self.look.patch_state(at) {
            _ if !ask(self.state(at)) => StackCheck::Clear(SwitchedBy::Stack),
            Some(PatchState::Invalid(state)) => StackCheck::Unknown(format!(
                "its patch_state is {state}, which no kernel writes"
            )),
            _ => self.look.standing(at, &watch),
        };
        StackChecks::ask(self.look.cached().len(), stand)
    }

    /// What to enter for each task, where those in state `target` got there by `way`.
    fn findings(
        &self,
        standings: &StackChecks,
        target: i32,
        switched_by: Option<SwitchedBy>,
    ) -> Vec<Outcome> {
        let mut findings = standings.clone().into_findings();
        for (at, finding) in findings.iter_mut().enumerate() {
            if self.state(at) == target {
                *finding = Outcome::Switched(switched_by);
            }
        }
        findings
    }

    /// Code in which a task's state and flag are being changed.
    fn switching(&self) -> CodeSet {
        let mut watch = CodeSet::new();
        for (code, name) in self.facts.klp.iter().flat_map(|klp| &klp.switching) {
            watch.add(*code, *name);
        }
        watch
    }

    /// Everybody is there. Is nobody in code that must not be pulled away?
    fn may_end(&self, direction: Direction) -> Result<(), StepError> {
        self.look.every_vcpu_has_a_task()?;
        self.look.no_vcpu_in(&self.switching())?;
        if direction == Direction::Revert && self.patch.forced {
            // Whoever is in the new code may stay: it is not taken away.
            self.text_is_still()?;
        } else if direction == Direction::Apply {
            self.replaced_are_left()?;
        } else {
            // A task that has moved can still be in a stub, on its way to the old function.
            self.look.no_task_in(&self.patch.new_code())?;
            self.text_is_still()?;
        }
        Ok(())
    }

    /// Nobody is in the code of patches that go with this one's coming.
    fn replaced_are_left(&self) -> Result<(), StepError> {
        if self.patch.replaces.is_empty() {
            return Ok(());
        }
        self.look.no_task_in(&self.patch.replaced_code())?;
        self.text_is_still()
    }

    /// A reschedule interrupt sends a vCPU in user mode through the kernel's exit path, and an idle one round its loop.
    fn nudge(&self, step: &mut Step) {
        let waiting = self.look.tasks().zip(&step.findings);
        step.nudge = waiting
            .filter(|(_, finding)| matches!(finding, Outcome::Blocked(_)))
            .filter_map(|(task, _)| self.look.vcpu_of(task))
            .filter(|vcpu| vcpu.online)
            .map(|vcpu| vcpu.index)
            .collect();
    }
}

impl Step {
    fn new(findings: Vec<Outcome>) -> Step {
        Step {
            plan: WriteBatch::new(),
            findings,
            finished: false,
            nudge: Vec::new(),
            wake: None,
            unmoved: None,
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

fn is_there(finding: &Outcome) -> bool {
    matches!(finding, Outcome::Switched(_))
}
