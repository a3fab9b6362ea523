//! The front: all that is known of one guest, and what can be asked of it.

use std::thread::sleep;
use std::time::Duration;

use introspect::{Kernel, ListedSymbol, Task, VcpuRegs, listing};

use crate::apply;
use crate::check::Trial;
use crate::error::PatchError;
use crate::guest::Guest;
use crate::look::Look;
use crate::machine::Machine;
use crate::module::{self, LivepatchModule};
use crate::patch::Patch;
use crate::pause::Paused;
use crate::place::Places;
use crate::quiet::Stop;
use crate::status::{CheckReport, PatchPhase, PatchStatus, PauseReport};
use crate::transition::{Direction, Scene, Step, Transition};
use crate::view::TaskStack;
use crate::wake::Waker;

/// The vector of the reschedule interrupt (`arch/x86/include/asm/irq_vectors.h: RESCHEDULE_VECTOR`), which has not changed since
/// x86-64 has it; a guest that gets it without need does nothing.
const RESCHEDULE_VECTOR: u8 = 0xfd;
/// How often a busy guest is looked at again before the caller is told.
const TRIES: u32 = 100;
/// The time between two such looks grows from the first to the second of these.
const TRY_WAIT: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// Patches one guest.
///
/// No call waits for the guest's tasks: [`apply`](Self::apply) and [`revert`](Self::revert) begin a transition, and
/// [`poll`](Self::poll) drives it, called again whenever it says. Between two calls the guest runs. A guest that is in the middle
/// of a change of its own is looked at again for a second or so before a call gives up.
#[derive(Debug, Default)]
pub struct Patcher {
    guest: Option<Guest>,
    places: Places,
    patches: Vec<Patch>,
    /// What wakes sleepers, once somebody was to be woken.
    waker: Option<Waker>,
    /// The last patch that was reverted.
    reverted: Option<PatchStatus>,
    pauses: PauseReport,
}

impl Patcher {
    /// A patcher that knows nothing of its guest yet.
    #[must_use]
    pub fn new() -> Patcher {
        Patcher::default()
    }

    /// The guest's kernel; found at the first call, remembered after.
    ///
    /// # Errors
    /// [`PatchError::NotReady`] early in boot.
    pub fn kernel<M: Machine>(&mut self, machine: &mut M) -> Result<&Kernel, PatchError> {
        self.guest(machine).map(|guest| &guest.kernel)
    }

    /// The banner of the guest's kernel; no pause once it is known.
    ///
    /// # Errors
    /// [`PatchError::NotReady`] early in boot.
    pub fn banner<M: Machine>(&mut self, machine: &mut M) -> Result<String, PatchError> {
        self.kernel(machine).map(|kernel| kernel.banner.clone())
    }

    fn guest<M: Machine>(&mut self, machine: &mut M) -> Result<&mut Guest, PatchError> {
        let guest = match self.guest.take() {
            Some(guest) => guest,
            None => Guest::find(machine, &mut self.pauses)?,
        };
        Ok(self.guest.insert(guest))
    }

    /// Every task of the guest, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn tasks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<Task>, PatchError> {
        self.look(machine, |_, look| Ok(look.tasks.clone()))
    }

    /// The stack of the task with thread id `pid`; with pid 0, that of the first CPU's idle task.
    ///
    /// # Errors
    /// [`PatchError::NoSuchTask`] and others.
    pub fn stack<M: Machine>(
        &mut self,
        machine: &mut M,
        pid: i32,
    ) -> Result<TaskStack, PatchError> {
        self.look(machine, |patches, look| {
            let mut tasks = look.tasks.iter();
            let task = tasks.find(|task| task.pid == pid);
            let task = task.ok_or(PatchError::NoSuchTask(pid))?;
            Ok(look.names(patches).stack(task, look.stack(task)))
        })
    }

    /// The stacks of all tasks, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn stacks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<TaskStack>, PatchError> {
        self.look(machine, |patches, look| {
            let names = look.names(patches);
            let name = |task| names.stack(task, look.stack(task));
            Ok(look.tasks.iter().map(name).collect())
        })
    }

    /// Every symbol of the guest, as its `/proc/kallsyms` lists them.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn symbols<M: Machine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Vec<ListedSymbol>, PatchError> {
        self.guest(machine)?;
        let paused = Paused::begin(machine, &mut self.pauses)?;
        let kernel = &self.guest.as_ref().ok_or_else(not_found)?.kernel;
        let behind = listing::behind_core(kernel, &kernel.memory(paused.memory()));
        paused.resume()?;
        let behind = behind.map_err(|error| PatchError::Guest(error.to_string()))?;
        let core = kernel.symbols.iter().map(|symbol| ListedSymbol {
            gva: symbol.gva,
            letter: symbol.letter,
            name: symbol.name.to_owned(),
            module: None,
        });
        Ok(core.chain(behind).collect())
    }

    /// Holds the guest still while `work` reads all that it wants of it, and says for how long that was. The kernel is `None`
    /// where it has not been found, early in boot for one.
    ///
    /// # Errors
    /// [`PatchError`] when the guest cannot be stopped or resumed.
    pub fn hold<M: Machine, T>(
        &mut self,
        machine: &mut M,
        work: impl FnOnce(Option<&Kernel>, &M::Memory, &[VcpuRegs]) -> T,
    ) -> Result<(T, Duration), PatchError> {
        if let Err(error) = self.guest(machine) {
            tracing::debug!(%error, "held without its kernel being known");
        }
        let paused = Paused::begin(machine, &mut self.pauses)?;
        let kernel = self.guest.as_ref().map(|guest| &guest.kernel);
        let done = work(kernel, paused.memory(), &paused.vcpus);
        let length = paused.resume()?;
        Ok((done, length))
    }

    /// One short pause for one question, asked again while the guest is busy.
    fn look<M: Machine, T>(
        &mut self,
        machine: &mut M,
        question: impl Fn(&[Patch], &Look<'_>) -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        self.guest(machine)?;
        let Patcher {
            guest,
            patches,
            pauses,
            ..
        } = self;
        let guest = guest.as_mut().ok_or_else(not_found)?;
        patiently(|| {
            let paused = Paused::begin(machine, pauses)?;
            let look = guest.look(paused.memory(), &paused.vcpus)?;
            Ok(question(patches, &look)?)
        })
    }

    /// Begins to apply the livepatch module in `file`; the name under which it goes from now on.
    ///
    /// # Errors
    /// [`PatchError`], with the guest as it was.
    pub fn apply<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
    ) -> Result<String, PatchError> {
        let module = self.welcome(machine, file)?;
        let name = module.name().to_string();
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let patch = apply::prepare(machine, guest, &mut self.places, &module, &self.patches)?;
        self.patches.push(patch);
        let at = self.patches.len() - 1;
        let begun = self
            .ready(machine, at)
            .and_then(|()| self.begin(machine, at, Direction::Apply));
        if let Err(error) = begun {
            // Where the undo failed the guest may still lead there.
            if !matches!(error, PatchError::Undo { .. }) {
                self.drop_patch(at);
            }
            return Err(error);
        }
        if self.reverted.as_ref().is_some_and(|old| old.name == name) {
            self.reverted = None;
        }
        Ok(name)
    }

    /// What [`apply`](Self::apply) would do now with the module in `file`. Writes nothing: `machine` may be one that cannot.
    ///
    /// # Errors
    /// [`PatchError`], that of `apply`.
    pub fn check<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
    ) -> Result<CheckReport, PatchError> {
        let module = self.welcome(machine, file)?;
        let Patcher {
            guest,
            places,
            patches,
            pauses,
            ..
        } = self;
        let guest = guest.as_mut().ok_or_else(not_found)?;
        let trial = Trial::prepare(machine, guest, places, &module, patches)?;
        let mut meter = PauseReport::default();
        let found = patiently(|| {
            let paused = Paused::begin(machine, &mut meter)?;
            trial.step(guest, paused.memory(), &paused.vcpus)
        });
        trial.forget(guest);
        pauses.merge(&meter);
        let (tasks, step) = found?;
        Ok(trial.report(&tasks, step, meter))
    }

    /// Begins to revert the applied patch `name`, or turns its running transition round.
    ///
    /// # Errors
    /// [`PatchError`], with the guest as it was.
    pub fn revert<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        let found = self.patches.iter().position(|patch| patch.name() == name);
        let at = found.ok_or_else(|| PatchError::NoSuchPatch(name.into()))?;
        match self.patches.get(at).map(|patch| patch.phase) {
            Some(PatchPhase::Applying) => self.turn_round(machine, at),
            Some(PatchPhase::Applied) => {
                self.no_transition()?;
                self.begin(machine, at, Direction::Revert)
            }
            _ => Err(PatchError::InTransition(name.into())),
        }
    }

    /// From `after` the start of the running transition of patch `name` on, sends the fake signal to the tasks that keep the old state:
    /// user tasks come by the kernel/user boundary, and the system calls that they sleep in restart or return EINTR, as with the
    /// kernel's own; kthreads are woken. Stopped and traced tasks get nothing.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on without.
    pub fn signal<M: Machine>(
        &mut self,
        machine: &mut M,
        name: &str,
        after: Duration,
    ) -> Result<(), PatchError> {
        let found = self.patches.iter().position(|patch| patch.name() == name);
        let at = found.ok_or_else(|| PatchError::NoSuchPatch(name.into()))?;
        if self.direction(at).is_none() {
            return Err(PatchError::NoTransition(name.into()));
        }
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let facts = guest.facts()?.clone();
        if facts.klp.notify_signal.is_none() {
            return Err(PatchError::Unsupported(
                "the fake signal needs TIF_NOTIFY_SIGNAL, which this kernel's code does not show"
                    .into(),
            ));
        }
        if self.waker.is_none() {
            self.waker = Some(Waker::prepare(machine, guest, &mut self.places, &facts)?);
        }
        let patch = self.patches.get_mut(at);
        if let Some(transition) = patch.and_then(|patch| patch.transition.as_mut()) {
            transition.signal_after(after);
        }
        Ok(())
    }

    /// Drives the transition that runs, if any. `Some`: call again after that long. `None`: nothing to do.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on, and can be polled again or turned round.
    pub fn poll<M: Machine>(&mut self, machine: &mut M) -> Result<Option<Duration>, PatchError> {
        let running = self.patches.iter().position(|p| p.transition.is_some());
        let Some(at) = running else {
            return Ok(None);
        };
        let Some(direction) = self.direction(at) else {
            return Ok(None);
        };
        let carried = self.carry_out(machine, at, |scene| scene.go_on(direction));
        let pause = match carried {
            Ok((tasks, step, pause)) => {
                self.enter(at, direction, &tasks, step);
                pause
            }
            Err(Stop::Busy(what)) => {
                tracing::debug!(what, "the guest is busy");
                Duration::ZERO
            }
            Err(Stop::Fail(error)) => return Err(error),
        };
        let running = self.patches.get_mut(at).and_then(|p| p.transition.as_mut());
        Ok(running.map(|transition| transition.next_wait(pause)))
    }

    /// Every patch that is in the guest, and the last one that was reverted; stops nothing.
    #[must_use]
    pub fn status(&self) -> Vec<PatchStatus> {
        let present = self.patches.iter().map(Patch::status);
        present.chain(self.reverted.clone()).collect()
    }

    /// All pauses so far, of every call.
    #[must_use]
    pub fn pauses(&self) -> PauseReport {
        self.pauses
    }

    /// The module in `file`, when nothing is in its way before its contents are looked at.
    fn welcome<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
    ) -> Result<LivepatchModule, PatchError> {
        self.no_transition()?;
        let module = module::parse(file)?;
        let name = module.name();
        if self.patches.iter().any(|patch| patch.name() == name) {
            return Err(PatchError::AlreadyApplied(name.into()));
        }
        self.guest(machine)?.facts()?;
        self.not_loaded(machine, name)?;
        Ok(module)
    }

    fn no_transition(&self) -> Result<(), PatchError> {
        match self.patches.iter().find(|p| p.transition.is_some()) {
            None => Ok(()),
            Some(patch) => Err(PatchError::InTransition(patch.name().into())),
        }
    }

    fn direction(&self, at: usize) -> Option<Direction> {
        let transition = self.patches.get(at)?.transition.as_ref()?;
        Some(transition.direction)
    }

    /// The guest's own module of that name would patch the same functions.
    fn not_loaded<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        let paused = Paused::begin(machine, &mut self.pauses)?;
        let guest = self.guest.as_ref().ok_or_else(not_found)?;
        let loaded = guest.loaded_modules(paused.memory())?;
        if loaded.contains(name) {
            return Err(PatchError::LoadedInGuest(name.into()));
        }
        Ok(())
    }

    /// What the patch and a transition need in hidden memory is there.
    fn ready<M: Machine>(&mut self, machine: &mut M, at: usize) -> Result<(), PatchError> {
        let guest = self.guest.as_ref().ok_or_else(not_found)?;
        let patch = self.patches.get(at).ok_or_else(not_found)?;
        apply::fill(machine, &guest.kernel, &self.places, patch)?;
        self.places
            .dummy(machine, &guest.kernel, guest.facts()?)
            .map(drop)
    }

    fn begin<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        direction: Direction,
    ) -> Result<(), PatchError> {
        let mut transition = Some(Transition::new(direction));
        let (tasks, step, _) = patiently(|| {
            self.carry_out_for(machine, at, &mut transition, |scene| scene.begin(direction))
        })?;
        if let Some(patch) = self.patches.get_mut(at) {
            patch.transition = transition;
            patch.phase = match direction {
                Direction::Apply => PatchPhase::Applying,
                Direction::Revert => PatchPhase::Reverting,
            };
        }
        self.enter(at, direction, &tasks, step);
        Ok(())
    }

    fn turn_round<M: Machine>(&mut self, machine: &mut M, at: usize) -> Result<(), PatchError> {
        let (from, to) = (Direction::Apply, Direction::Revert);
        let (tasks, step, _) =
            patiently(|| self.carry_out(machine, at, |scene| scene.turn_round(from, to)))?;
        if let Some(patch) = self.patches.get_mut(at) {
            patch.phase = PatchPhase::Reverting;
            if let Some(transition) = &mut patch.transition {
                transition.turn(to);
            }
        }
        self.enter(at, to, &tasks, step);
        Ok(())
    }

    /// Enters what a step found, and ends the transition if the step did.
    fn enter(&mut self, at: usize, direction: Direction, tasks: &[Task], step: Step) {
        let Some(patch) = self.patches.get_mut(at) else {
            return;
        };
        let Some(transition) = &mut patch.transition else {
            return;
        };
        transition.enter(tasks, step.findings);
        if !step.finished {
            return;
        }
        patch.past = transition.so_far();
        patch.transition = None;
        match direction {
            Direction::Apply => patch.phase = PatchPhase::Applied,
            Direction::Revert => {
                patch.phase = PatchPhase::Reverted;
                self.reverted = Some(patch.status());
                self.drop_patch(at);
            }
        }
    }

    /// Forgets a patch that is no longer in the guest.
    fn drop_patch(&mut self, at: usize) {
        if at >= self.patches.len() {
            return;
        }
        let patch = self.patches.remove(at);
        self.places.give_back(patch.code);
        patch
            .data
            .into_iter()
            .for_each(|data| self.places.give_back(data));
        if let Some(guest) = &mut self.guest {
            guest.unwinder.remove_busy(patch.stubs);
            patch
                .region
                .into_iter()
                .for_each(|id| guest.unwinder.remove_region(id));
        }
    }

    /// One look at the guest for the patch's running transition: as [`carry_out_for`](Self::carry_out_for).
    fn carry_out<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        make: impl FnOnce(&Scene<'_>) -> Result<Step, Stop>,
    ) -> Result<(Vec<Task>, Step, Duration), Stop> {
        let mut transition = self.patches.get_mut(at).and_then(|p| p.transition.take());
        let done = self.carry_out_for(machine, at, &mut transition, make);
        if let Some(patch) = self.patches.get_mut(at) {
            patch.transition = transition;
        }
        done
    }

    /// One pause: a look, the step that `make` makes of it, its writes, and the guest running again with its interrupts sent.
    fn carry_out_for<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        transition: &mut Option<Transition>,
        make: impl FnOnce(&Scene<'_>) -> Result<Step, Stop>,
    ) -> Result<(Vec<Task>, Step, Duration), Stop> {
        let mut meter = PauseReport::default();
        let signals = transition.as_ref().is_some_and(Transition::signals);
        let done = self.in_pause(machine, at, signals, &mut meter, make);
        self.pauses.merge(&meter);
        if let Some(transition) = transition {
            transition.pauses.merge(&meter);
        }
        let (tasks, step) = done?;
        for vcpu in &step.nudge {
            // It only hastens what the guest does anyway.
            if let Err(error) = machine.interrupt(*vcpu, RESCHEDULE_VECTOR) {
                tracing::debug!(%error, vcpu, "no reschedule interrupt");
            }
        }
        if let Some(start) = step.wake {
            // The list is out: whatever comes to it first works it off, the next tick at the latest.
            if let Err(error) = machine.interrupt(start.vcpu, start.vector) {
                tracing::warn!(%error, "sleepers are woken later");
            }
        }
        Ok((tasks, step, Duration::from_micros(meter.longest_us)))
    }

    fn in_pause<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
        signals: bool,
        meter: &mut PauseReport,
        make: impl FnOnce(&Scene<'_>) -> Result<Step, Stop>,
    ) -> Result<(Vec<Task>, Step), Stop> {
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let facts = guest.facts()?.clone();
        let patch = self.patches.get(at).ok_or_else(not_found)?;
        let dummy = self.places.known_dummy().ok_or_else(not_found)?;
        let mut paused = Paused::begin(machine, meter)?;
        let mut mapping = crate::journal::Plan::new();
        let (tasks, step) = {
            let look = guest.look(paused.memory(), &paused.vcpus)?;
            self.places.plan_mapping(&look.memory, &mut mapping)?;
            let scene = Scene {
                look: &look,
                facts: &facts,
                places: &self.places,
                dummy,
                patch,
                signal: self.waker.as_ref().filter(|_| signals),
            };
            let step = make(&scene)?;
            (look.tasks, step)
        };
        let mapped = paused.commit(&mapping)?;
        let reached = self
            .places
            .check_mapping(&guest.kernel.memory(paused.memory()));
        let done = reached.and_then(|()| paused.commit(&step.plan).map(drop));
        if let Err(error) = done {
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
        Ok((tasks, step))
    }
}

/// Asks again while the guest is busy.
fn patiently<T>(mut ask: impl FnMut() -> Result<T, Stop>) -> Result<T, PatchError> {
    let mut wait = TRY_WAIT.0;
    let mut tries = 1;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Busy(what)) if tries >= TRIES => {
                return Err(PatchError::Busy { what, tries });
            }
            Err(Stop::Busy(_)) => {}
        }
        sleep(wait);
        wait = (wait * 2).min(TRY_WAIT.1);
        tries += 1;
    }
}

fn not_found() -> PatchError {
    PatchError::NotReady("no kernel found yet".into())
}
