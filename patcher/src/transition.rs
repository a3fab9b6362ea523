//! The transition of a guest's tasks from one patch state to the other, look by look.
//!
//! Linux's per-task consistency model (`kernel/livepatch/transition.c`), run from outside. Each function here is given one look
//! at a paused guest and yields a [`Step`]: the writes to carry out in that same pause, and what to enter in the book. None of
//! them writes. What happens between two looks is the guest's own doing: its entry code and idle loop flip tasks that carry
//! TIF_PATCH_PENDING to `klp_target_state`, and its forks inherit.

use std::time::{Duration, Instant};

use introspect::{PatchState, Task, TaskKind};

use crate::error::PatchError;
use crate::facts::Facts;
use crate::journal::Plan;
use crate::ledger::{Blocked, Finding, Ledger};
use crate::look::{Look, Standing, Watch};
use crate::patch::{Patch, Redirect};
use crate::place::Places;
use crate::quiet::{self, NO_STATE, Stop};
use crate::redirect::{EncodeError, SITE_LEN};
use crate::signal;
use crate::status::{PauseReport, TaskReport, TaskWay};
use crate::wake::{self, Start, Waker};

/// The time to the second look.
const FIRST_WAIT: Duration = Duration::from_millis(1);
/// The longest time between two looks.
const LONGEST_WAIT: Duration = Duration::from_millis(250);
/// At most one part in this many of the guest's time is spent paused.
const PAUSE_SHARE: u32 = 5;

/// Which way tasks move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the new code.
    Apply,
    /// Back to the old code.
    Revert,
}

impl Direction {
    /// The patch state that tasks move to (`KLP_TRANSITION_UNPATCHED`, `_PATCHED`).
    #[must_use]
    pub fn target(self) -> i32 {
        match self {
            Direction::Apply => 1,
            Direction::Revert => 0,
        }
    }

    fn initial(self) -> i32 {
        1 - self.target()
    }

    /// The code that a task must not be in to be moved.
    fn watch(self, patch: &Patch) -> Watch {
        match self {
            Direction::Apply => patch.old_code(),
            Direction::Revert => patch.new_code(),
        }
    }
}

/// A transition that has ended, or as far as it has come.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// Its tasks.
    pub tasks: Vec<TaskReport>,
    /// How long it took.
    pub ms: u64,
    /// What it cost.
    pub pauses: PauseReport,
}

/// A transition that runs.
#[derive(Debug)]
pub struct Transition {
    /// Which way.
    pub direction: Direction,
    /// What it cost so far.
    pub pauses: PauseReport,
    began: Instant,
    ledger: Ledger,
    wait: Duration,
    /// From when on those who keep the old state are sent the fake signal.
    signal: Option<Instant>,
}

impl Transition {
    /// One that begins now.
    #[must_use]
    pub fn new(direction: Direction) -> Transition {
        Transition {
            direction,
            pauses: PauseReport::default(),
            began: Instant::now(),
            ledger: Ledger::default(),
            wait: FIRST_WAIT,
            signal: None,
        }
    }

    /// From `after` the start on, those who keep the old state are sent the fake signal, look by look.
    pub fn signal_after(&mut self, after: Duration) {
        let asked = self.began.checked_add(after);
        self.signal = match (self.signal, asked) {
            (Some(earlier), Some(asked)) => Some(earlier.min(asked)),
            (known, asked) => known.or(asked),
        };
        self.wait = FIRST_WAIT;
    }

    /// Whether the fake signal is sent now.
    #[must_use]
    pub fn signals(&self) -> bool {
        self.signal.is_some_and(|from| from <= Instant::now())
    }

    /// Enters what a step found, once it is carried out.
    pub fn enter(&mut self, tasks: &[Task], findings: Vec<Finding>) {
        self.ledger
            .enter(self.began.elapsed(), tasks.iter().zip(findings));
    }

    /// Turns round: everybody may have to move again.
    pub fn turn(&mut self, direction: Direction) {
        self.direction = direction;
        self.ledger.restart();
        self.wait = FIRST_WAIT;
    }

    /// How long to let the guest run before the next look, after a pause of `pause`.
    pub fn next_wait(&mut self, pause: Duration) -> Duration {
        let wait = self.wait.max(pause * PAUSE_SHARE);
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        // The admin's delay is met, and what it changes is seen soon.
        let until_signal = self
            .signal
            .map(|from| from.saturating_duration_since(Instant::now()))
            .filter(|left| !left.is_zero());
        wait.min(until_signal.unwrap_or(wait))
    }

    /// As far as it has come.
    #[must_use]
    pub fn so_far(&self) -> Past {
        Past {
            tasks: self.ledger.reports(),
            ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            pauses: self.pauses,
        }
    }
}

/// What to do in the pause of one look, and what it found.
#[derive(Debug)]
pub struct Step {
    /// The writes.
    pub plan: Plan,
    /// For each task of the look.
    pub findings: Vec<Finding>,
    /// With these writes the transition is over.
    pub finished: bool,
    /// vCPUs to send a reschedule interrupt once the guest runs.
    pub nudge: Vec<u32>,
    /// The interrupt that wakes sleepers, likewise.
    pub wake: Option<Start>,
}

impl From<EncodeError> for PatchError {
    fn from(error: EncodeError) -> Self {
        PatchError::NoRoom(error.to_string())
    }
}

/// The guest, what is known of it, and the patch: what every step needs.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The look.
    pub look: &'a Look<'a>,
    /// The kernel.
    pub facts: &'a Facts,
    /// Where things lie.
    pub places: &'a Places,
    /// The stand-in for `klp_transition_patch`.
    pub dummy: introspect::Gva,
    /// The patch.
    pub patch: &'a Patch,
    /// Those who keep the old state are sent the fake signal, and this wakes the sleepers among them.
    pub signal: Option<&'a Waker>,
}

impl Scene<'_> {
    /// Begins the transition: everybody who can be moved in this very pause is, and the rest is marked for the guest's own code
    /// to move. When nobody is left, no task ever sees a transition at all.
    ///
    /// # Errors
    /// [`Stop`]; nothing is to be written.
    pub fn begin(&self, direction: Direction) -> Result<Step, Stop> {
        quiet::no_transition(&self.look.memory, self.facts)?;
        self.text_is_still()?;
        self.no_states()?;
        self.sites_are_as_before(direction)?;
        if direction == Direction::Apply {
            self.places.check(&self.look.memory, self.patch.code)?;
        }
        let standings = self.standings(direction, |_| true);
        let mut step = Step::new(standings.iter().map(finding).collect());
        if direction == Direction::Apply {
            self.plan_code(&mut step.plan)?;
        }
        let all = step.findings.iter().all(is_there);
        if all && self.look.every_vcpu_has_a_task().is_ok() {
            self.plan_end(direction, &mut step.plan)?;
            step.finished = true;
            return Ok(step);
        }
        self.plan_globals(direction.target(), Some(self.dummy), &mut step.plan)?;
        for (task, standing) in self.look.tasks.iter().zip(&standings) {
            if matches!(standing, Standing::Clean(_)) {
                self.plan_state(task, direction.target(), &mut step.plan)?;
            } else {
                self.plan_state(task, direction.initial(), &mut step.plan)?;
                self.plan_pending(task, true, &mut step.plan)?;
            }
        }
        self.plan_sites(&mut step.plan, Redirect::to_stub)?;
        self.nudge(&mut step);
        Ok(step)
    }

    /// Goes on: moves those who can be moved now, and ends the transition when nobody is left.
    ///
    /// # Errors
    /// [`Stop`]; nothing is to be written.
    pub fn go_on(&self, direction: Direction) -> Result<Step, Stop> {
        self.is_ours(direction)?;
        let target = direction.target();
        let standings = self.standings(direction, |task| state(task) != target);
        let mut step = Step::new(self.findings(&standings, target, None));
        if step.findings.iter().all(is_there) {
            match self.may_end(direction) {
                Ok(()) => {
                    self.plan_no_states(&mut step.plan)?;
                    self.plan_end(direction, &mut step.plan)?;
                    self.plan_globals(NO_STATE, None, &mut step.plan)?;
                    step.finished = true;
                    return Ok(step);
                }
                Err(Stop::Busy(why)) => tracing::debug!(why, "the transition cannot end yet"),
                Err(fail) => return Err(fail),
            }
        }
        for (task, standing) in self.look.tasks.iter().zip(&standings) {
            if state(task) == target {
                continue;
            }
            if matches!(standing, Standing::Clean(_)) {
                self.plan_state(task, target, &mut step.plan)?;
                self.plan_pending(task, false, &mut step.plan)?;
            } else {
                self.plan_pending(task, true, &mut step.plan)?;
            }
        }
        self.send_signals(&mut step)?;
        self.nudge(&mut step);
        Ok(step)
    }

    /// The fake signal to everybody who keeps the old state ([`signal`]).
    fn send_signals(&self, step: &mut Step) -> Result<(), Stop> {
        let (Some(waker), Some(flag)) = (self.signal, self.facts.klp.notify_signal) else {
            return Ok(());
        };
        let memory = &self.look.memory;
        // One list of sleepers is out at a time.
        let idle = waker.is_idle(memory)?;
        let mut sleepers = Vec::new();
        for (task, finding) in self.look.tasks.iter().zip(&mut step.findings) {
            let Finding::Blocked(blocked) = finding else {
                continue;
            };
            let call = signal::call(task);
            if call.flag && task.tif & flag == 0 {
                self.plan_flags(task, true, flag, &mut step.plan)?;
                blocked.signalled = true;
            }
            if call.wake && idle && sleepers.len() < wake::MOST {
                sleepers.push(task);
                blocked.signalled = true;
            }
        }
        if !sleepers.is_empty() {
            step.wake = waker.plan(self.look, self.places, &sleepers, &mut step.plan)?;
        }
        Ok(())
    }

    /// Turns a running transition round, as `klp_reverse_transition` does: those who have moved are to move back.
    ///
    /// # Errors
    /// [`Stop`]; nothing is to be written.
    pub fn turn_round(&self, from: Direction, to: Direction) -> Result<Step, Stop> {
        self.is_ours(from)?;
        // Whoever is just storing the old target would store it after us.
        self.look.no_vcpu_in(&self.switching())?;
        let target = to.target();
        let standings = self.standings(to, |task| state(task) != target);
        let mut step = Step::new(self.findings(&standings, target, Some(TaskWay::Unmoved)));
        self.plan_globals(target, Some(self.dummy), &mut step.plan)?;
        for (task, standing) in self.look.tasks.iter().zip(&standings) {
            let clean = matches!(standing, Standing::Clean(_));
            if clean && state(task) != target {
                self.plan_state(task, target, &mut step.plan)?;
            }
            self.plan_pending(task, !clean, &mut step.plan)?;
        }
        self.nudge(&mut step);
        Ok(step)
    }

    /// The transition is the one we began, and the entries are as we left them.
    fn is_ours(&self, direction: Direction) -> Result<(), Stop> {
        let memory = &self.look.memory;
        quiet::our_transition(memory, self.facts, direction.target(), self.dummy)?;
        self.sites_hold(|redirect| Ok(redirect.to_stub()?), true)
    }

    fn text_is_still(&self) -> Result<(), Stop> {
        quiet::no_locks(&self.look.memory, self.facts)?;
        quiet::no_poke(self.look.kernel, &self.look.memory, self.facts)
    }

    fn no_states(&self) -> Result<(), Stop> {
        let other = |task: &&Task| task.patch_state != Some(PatchState::Idle);
        match self.look.tasks.iter().find(other) {
            None => Ok(()),
            Some(task) => Err(Stop::Busy(format!(
                "{} ({}) has a patch state already",
                task.comm, task.pid
            ))),
        }
    }

    fn sites_are_as_before(&self, direction: Direction) -> Result<(), Stop> {
        match direction {
            Direction::Apply => self.sites_hold(|redirect| Ok(redirect.site.nop), false),
            Direction::Revert => self.sites_hold(|redirect| Ok(redirect.to_new()?), true),
        }
    }

    fn sites_hold(
        &self,
        expected: impl Fn(&Redirect) -> Result<[u8; SITE_LEN], PatchError>,
        fenced: bool,
    ) -> Result<(), Stop> {
        let (memory, types) = (&self.look.memory, &self.facts.ftrace);
        for redirect in &self.patch.redirects {
            let site = &redirect.site;
            let as_expected = site.holds(memory, expected(redirect)?)?
                && site.is_fenced(memory, types)? == fenced
                && (fenced || !site.is_wanted(memory, types)?);
            if !as_expected {
                return Err(Stop::Fail(PatchError::Site {
                    function: redirect.name.clone(),
                    at: site.at,
                    why: "somebody in the guest changed its entry or its ftrace record".into(),
                }));
            }
        }
        Ok(())
    }

    /// Where each task stands; those that `ask` leaves out are taken to be clean.
    fn standings(&self, direction: Direction, ask: impl Fn(&Task) -> bool) -> Vec<Standing> {
        let watch = direction.watch(self.patch);
        let stand = |task: &Task| {
            if !ask(task) {
                return Standing::Clean(TaskWay::Stack);
            }
            match task.patch_state {
                Some(PatchState::Invalid(state)) => Standing::Blocked(format!(
                    "its patch_state is {state}, which no kernel writes"
                )),
                _ => self.look.standing(task, &watch),
            }
        };
        self.look.tasks.iter().map(stand).collect()
    }

    /// What to enter for each task, where those in state `target` got there by `way`.
    fn findings(&self, standings: &[Standing], target: i32, way: Option<TaskWay>) -> Vec<Finding> {
        let each = self.look.tasks.iter().zip(standings);
        each.map(|(task, standing)| match standing {
            _ if state(task) == target => Finding::There(way),
            other => finding(other),
        })
        .collect()
    }

    /// Code in which a task's state and flag are being changed.
    fn switching(&self) -> Watch {
        let mut watch = Watch::new();
        for (code, name) in &self.facts.klp.switching {
            watch.add(*code, *name);
        }
        watch
    }

    /// Everybody is there. Is nobody in code that must not be pulled away?
    fn may_end(&self, direction: Direction) -> Result<(), Stop> {
        self.look.every_vcpu_has_a_task()?;
        self.look.no_vcpu_in(&self.switching())?;
        if direction == Direction::Revert {
            // A task that has moved can still be in a stub, on its way to the old function.
            self.look.no_task_in(&self.patch.new_code())?;
            self.text_is_still()?;
        }
        Ok(())
    }

    fn plan_code(&self, plan: &mut Plan) -> Result<(), Stop> {
        let (memory, patch) = (&self.look.memory, self.patch);
        self.places
            .plan_fill(memory, patch.code, &patch.code_bytes, plan)?;
        Ok(())
    }

    /// What the entries, their records and the code's place hold from now on.
    fn plan_end(&self, direction: Direction, plan: &mut Plan) -> Result<(), Stop> {
        let memory = &self.look.memory;
        match direction {
            Direction::Apply => self.plan_sites(plan, Redirect::to_new),
            Direction::Revert => {
                self.plan_sites(plan, |redirect| Ok(redirect.site.nop))?;
                self.places.plan_clear(memory, self.patch.code, plan)?;
                Ok(())
            }
        }
    }

    /// Plans what each entry is to hold, and with it that ftrace leaves the entry alone, unless it holds its own NOP again.
    fn plan_sites(
        &self,
        plan: &mut Plan,
        bytes: impl Fn(&Redirect) -> Result<[u8; SITE_LEN], EncodeError>,
    ) -> Result<(), Stop> {
        let memory = &self.look.memory;
        for redirect in &self.patch.redirects {
            let site = &redirect.site;
            let bytes = bytes(redirect).map_err(PatchError::from)?;
            let (flags, value) = site.fence(memory, &self.facts.ftrace, bytes != site.nop)?;
            plan.write_kernel(memory, flags, &value)?;
            plan.write_kernel(memory, site.at, &bytes)?;
        }
        Ok(())
    }

    fn plan_globals(
        &self,
        target: i32,
        patch: Option<introspect::Gva>,
        plan: &mut Plan,
    ) -> Result<(), Stop> {
        let (memory, klp) = (&self.look.memory, &self.facts.klp);
        let patch = patch.unwrap_or_default().0;
        plan.write_kernel(memory, klp.target_state, &target.to_le_bytes())?;
        plan.write_kernel(memory, klp.transition_patch, &patch.to_le_bytes())?;
        Ok(())
    }

    /// Nobody has a state, and nobody is to change it.
    fn plan_no_states(&self, plan: &mut Plan) -> Result<(), Stop> {
        for task in &self.look.tasks {
            self.plan_pending(task, false, plan)?;
            self.plan_state(task, NO_STATE, plan)?;
        }
        Ok(())
    }

    fn plan_state(&self, task: &Task, state: i32, plan: &mut Plan) -> Result<(), Stop> {
        let at = self.facts.klp.patch_state.of(task.addr);
        plan.write_kernel(&self.look.memory, at, &state.to_le_bytes())?;
        Ok(())
    }

    /// Plans `task`'s TIF_PATCH_PENDING. Nobody else writes the flags in this pause, so the others keep their values.
    fn plan_pending(&self, task: &Task, pending: bool, plan: &mut Plan) -> Result<(), Stop> {
        self.plan_flags(task, pending, 0, plan)
    }

    /// The same, with other flags set.
    fn plan_flags(
        &self,
        task: &Task,
        pending: bool,
        others: u64,
        plan: &mut Plan,
    ) -> Result<(), Stop> {
        let mut flags = if pending {
            task.tif | self.facts.klp.pending
        } else {
            task.tif & !self.facts.klp.pending
        } | others;
        // An idle task looks at its flag only when it goes round its loop.
        if let (true, TaskKind::Idle, Some(bit)) = (pending, task.kind, self.facts.klp.need_resched)
        {
            flags |= bit;
        }
        if flags != task.tif {
            let at = self.facts.klp.thread_flags.of(task.addr);
            plan.write_kernel(&self.look.memory, at, &flags.to_le_bytes())?;
        }
        Ok(())
    }

    /// A reschedule interrupt sends a vCPU in user mode through the kernel's exit path, and an idle one round its loop.
    fn nudge(&self, step: &mut Step) {
        let waiting = self.look.tasks.iter().zip(&step.findings);
        step.nudge = waiting
            .filter(|(_, finding)| matches!(finding, Finding::Blocked(_)))
            .filter_map(|(task, _)| self.look.vcpu_of(task))
            .filter(|vcpu| vcpu.online)
            .map(|vcpu| vcpu.index)
            .collect();
    }
}

impl Step {
    fn new(findings: Vec<Finding>) -> Step {
        Step {
            plan: Plan::new(),
            findings,
            finished: false,
            nudge: Vec::new(),
            wake: None,
        }
    }
}

/// The task's patch state as a number; `NO_STATE` in a kernel that has none.
fn state(task: &Task) -> i32 {
    match task.patch_state {
        None | Some(PatchState::Idle) => NO_STATE,
        Some(PatchState::Unpatched) => 0,
        Some(PatchState::Patched) => 1,
        Some(PatchState::Invalid(other)) => other,
    }
}

fn finding(standing: &Standing) -> Finding {
    match standing {
        Standing::Clean(way) => Finding::There(Some(*way)),
        Standing::Blocked(why) => Finding::Blocked(Blocked {
            why: why.clone(),
            signalled: false,
        }),
    }
}

fn is_there(finding: &Finding) -> bool {
    matches!(finding, Finding::There(_))
}
