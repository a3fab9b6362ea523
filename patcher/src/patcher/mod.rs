//! The front: all that is known of one guest, and what can be done to it. What can be asked of it: `questions`.

mod drive;
mod dry_run;
mod queries;

use std::thread::sleep;
use std::time::{Duration, Instant};

use introspect::Kernel;

use crate::call::wake::TaskWaker;
use crate::error::PatchError;
use crate::guest::Guest;
use crate::guest::pause::PauseGuard;
use crate::livepatch::patch::Patch;
use crate::livepatch::prepare;
use crate::machine::Machine;
use crate::memory::PatchMemory;
use crate::module::{self, LivepatchModule};
use crate::report::patch::{Mode, PatchPhase, PatchStatus, PauseReport};
use crate::transition::Direction;
use crate::transition::preconditions::StepError;

/// How often a busy guest is looked at again before the caller is told.
const TRIES: u32 = 100;
/// The time between two such looks grows from the first to the second of these.
const TRY_WAIT: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// Patches one guest.
///
/// No call waits for the guest's tasks: [`apply`](Self::apply) and [`revert`](Self::revert) begin a transition, and
/// [`poll`](Self::poll) drives it, called again whenever that is [`due`](Self::due). Between two calls the
/// guest runs. A guest that is in the middle of a change of its own is looked at again for a second or so before a call gives up.
#[derive(Debug, Default)]
pub struct Patcher {
    guest: Option<Guest>,
    places: PatchMemory,
    patches: Vec<Patch>,
    /// What wakes sleepers, once somebody was to be woken.
    waker: Option<TaskWaker>,
    /// The last patch that was reverted.
    reverted: Option<PatchStatus>,
    pauses: PauseReport,
    walks_in_the_pause: bool,
}

impl Patcher {
    /// A patcher that knows nothing of its guest yet.
    #[must_use]
    pub fn new() -> Patcher {
        Patcher::default()
    }

    /// One that walks stacks in the pause only: for measuring what [walking ahead](introspect::task_list::TaskCache) is worth.
    #[must_use]
    pub fn without_walking_ahead() -> Patcher {
        Patcher {
            walks_in_the_pause: true,
            ..Patcher::default()
        }
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

    /// Begins to apply the livepatch module in `file`; the name under which it goes from now on.
    ///
    /// # Errors
    /// [`PatchError`], with the guest as it was.
    pub fn apply<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
        mode: Mode,
    ) -> Result<String, PatchError> {
        let module = self.welcome(machine, file)?;
        let name = module.name().to_string();
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let patch = prepare::prepare(machine, guest, &mut self.places, &module, &self.patches)?;
        self.patches.push(patch);
        let at = self.patches.len() - 1;
        let begun = self
            .ready(machine, at)
            .and_then(|()| self.begin(machine, at, Direction::Apply, mode));
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

    /// Begins to revert the applied patch `name`, or turns its running transition round.
    ///
    /// # Errors
    /// [`PatchError`], with the guest as it was.
    pub fn revert<M: Machine>(
        &mut self,
        machine: &mut M,
        name: &str,
        mode: Mode,
    ) -> Result<(), PatchError> {
        let at = self.position(name)?;
        match self.patches.get(at).map(|patch| patch.phase) {
            Some(PatchPhase::Applying) => self.turn_round(machine, at),
            Some(PatchPhase::Applied) => {
                self.no_transition()?;
                self.begin(machine, at, Direction::Revert, mode)
            }
            _ => Err(PatchError::InTransition(name.into())),
        }
    }

    /// Turns the running transition of patch `name` round, whichever way it goes: those who have moved are to move back.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on as before.
    pub fn cancel<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        let at = self.in_transition(name)?;
        self.turn_round(machine, at)
    }

    /// Ends the running transition of patch `name` by moving every task now, wherever it is. What is given up: a task that is in an
    /// old function goes on in it, and calls new ones from there, or the other way round. The patch's code stays in the guest for
    /// ever, as nobody knows who is still in it; it can be reverted, not removed.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on as before.
    pub fn force<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        let at = self.in_transition(name)?;
        let direction = self.direction(at).ok_or_else(not_found)?;
        let (step, _) = patiently(|| self.carry_out(machine, at, |scene| scene.force(direction)))?;
        tracing::warn!(patch = name, "a transition was forced");
        let (older, rest) = self.patches.split_at_mut(at);
        if let Some(patch) = rest.first_mut() {
            patch.forced = true;
            // Nor does anybody know who is in those that it takes the place of (`klp_force_transition`).
            if patch.image.replace {
                patch.replaces.iter_mut().for_each(|old| old.stays = true);
                older.iter_mut().for_each(|old| old.forced = true);
            }
        }
        self.enter(at, direction, step);
        Ok(())
    }

    fn position(&self, name: &str) -> Result<usize, PatchError> {
        let found = self.patches.iter().position(|patch| patch.name() == name);
        found.ok_or_else(|| PatchError::NoSuchPatch(name.into()))
    }

    fn in_transition(&self, name: &str) -> Result<usize, PatchError> {
        let at = self.position(name)?;
        match self.direction(at) {
            Some(_) => Ok(at),
            None => Err(PatchError::NoTransition(name.into())),
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
        let at = self.in_transition(name)?;
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let facts = guest.facts()?.clone();
        if facts.klp.is_none() {
            return Err(PatchError::Unsupported(
                "the fake signal needs CONFIG_LIVEPATCH in the guest: without it a task that is signalled does not move where it \
                 leaves the kernel"
                    .into(),
            ));
        }
        if facts.tif.notify_signal.is_none() {
            return Err(PatchError::Unsupported(
                "the fake signal needs TIF_NOTIFY_SIGNAL, which this kernel's code does not show"
                    .into(),
            ));
        }
        if self.waker.is_none() {
            self.waker = Some(TaskWaker::prepare(
                machine,
                guest,
                &mut self.places,
                &facts,
            )?);
        }
        let patch = self.patches.get_mut(at);
        if let Some(transition) = patch.and_then(|patch| patch.transition.as_mut()) {
            transition.signal_after(after);
        }
        Ok(())
    }

    /// Looks at the transition that runs, if any, and drives it on; to be called when that is [`due`](Self::due).
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on, and can be polled again or turned round.
    pub fn poll<M: Machine>(&mut self, machine: &mut M) -> Result<(), PatchError> {
        let Some(at) = self.running() else {
            return Ok(());
        };
        let Some(direction) = self.direction(at) else {
            return Ok(());
        };
        let carried = self.carry_out(machine, at, |scene| scene.go_on(direction));
        let (looked, done) = match carried {
            Ok((step, pause)) => {
                self.enter(at, direction, step);
                (Some(pause), Ok(()))
            }
            Err(StepError::Busy(what)) => {
                tracing::debug!(what, "the guest is busy");
                (Some(Duration::ZERO), Ok(()))
            }
            Err(StepError::Fail(error)) => (None, Err(error)),
        };
        let running = self.patches.get_mut(at).and_then(|p| p.transition.as_mut());
        if let Some(transition) = running {
            match looked {
                Some(pause) => transition.looked(pause),
                None => transition.failed(),
            }
        }
        done
    }

    /// When the transition that runs is to be looked at again: not before, so that the guest gets on. `None`: none runs.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let transition = self.patches.get(self.running()?)?.transition.as_ref()?;
        Some(transition.due())
    }

    fn running(&self) -> Option<usize> {
        self.patches.iter().position(|p| p.transition.is_some())
    }

    /// Every patch that is in the guest, and the last one that was reverted; stops nothing.
    #[must_use]
    pub fn status(&self) -> Vec<PatchStatus> {
        let present = self.patches.iter().map(Patch::status);
        present.chain(self.reverted.clone()).collect()
    }

    /// All pauses so far, of every call.
    #[must_use]
    pub fn pauses(&self) -> &PauseReport {
        &self.pauses
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
        let guest = self.guest.as_mut().ok_or_else(not_found)?;
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        if let Err(error) = guest.is_there(paused.memory(), &paused.vcpus) {
            drop(paused);
            return Err(self.lost(error));
        }
        // What the walk ahead of the first look needs to know.
        guest.refresh(paused.memory());
        let loaded = guest.loaded_modules(paused.memory())?;
        if loaded.contains(name) {
            return Err(PatchError::LoadedInGuest(name.into()));
        }
        Ok(())
    }

    /// Forgets a guest that runs another kernel, with all that was done to the old one. Other errors change nothing.
    fn lost(&mut self, error: PatchError) -> PatchError {
        if matches!(error, PatchError::AnotherKernel(_)) {
            tracing::warn!(%error, patches = self.patches.len(), "the guest's kernel is gone");
            self.guest = None;
            self.patches.clear();
            self.waker = None;
            // What is hidden there stays, and is no longer the guest's to see.
            self.places = PatchMemory::default();
        }
        error
    }

    /// What the patch and a transition need in hidden memory is there.
    fn ready<M: Machine>(&mut self, machine: &mut M, at: usize) -> Result<(), PatchError> {
        let guest = self.guest.as_ref().ok_or_else(not_found)?;
        let patch = self.patches.get(at).ok_or_else(not_found)?;
        prepare::fill(machine, &guest.kernel, &self.places, patch)?;
        self.places
            .dummy(machine, &guest.kernel, guest.facts()?)
            .map(drop)
    }
}

/// Asks again while the guest is busy.
fn patiently<T>(mut ask: impl FnMut() -> Result<T, StepError>) -> Result<T, PatchError> {
    let mut wait = TRY_WAIT.0;
    let mut tries = 1;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(StepError::Fail(error)) => return Err(error),
            Err(StepError::Busy(what)) if tries >= TRIES => {
                return Err(PatchError::Busy { what, tries });
            }
            Err(StepError::Busy(_)) => {}
        }
        sleep(wait);
        wait = (wait * 2).min(TRY_WAIT.1);
        tries += 1;
    }
}

fn not_found() -> PatchError {
    PatchError::NotReady("no kernel found yet".into())
}
