//! [`Patcher`]: a patching session for one guest.
//!
//! This module owns what is known of the guest, the patches in it, and the transition that is
//! running. It knows in which order things are done: [`Patcher::apply`] parses a module
//! ([`module`]), prepares a patch of it ([`livepatch::prepare`](crate::livepatch::prepare)) and
//! starts its transition; what a pause reads and writes is decided in
//! [`transition`](crate::transition). It must not know how the guest is stopped: that is known to
//! [`Machine`].

mod drive;
mod dry_run;
mod queries;

pub use queries::KernelInUse;

use std::thread::sleep;
use std::time::{Duration, Instant};

use introspect::{Gva, Kernel, NotReady};

use crate::call::wake::TaskWaker;
use crate::error::{PatchError, StepError};
use crate::guest::Guest;
use crate::guest::pause::PauseGuard;
use crate::livepatch::direction::Direction;
use crate::livepatch::dummy_patch;
use crate::livepatch::patch::Patch;
use crate::livepatch::prepare;
use crate::machine::Machine;
use crate::memory::PatchMemory;
use crate::memory::error::PatchMemoryError;
use crate::module::{self, LivepatchModule};
use crate::report::patch::{Mode, PatchPhase, PatchStatus};
use crate::report::pause::PauseReport;
use crate::transition::Transition;

/// How often a busy guest is tried before the caller is told.
const MAX_TRIES: u32 = 100;
/// The time between two tries grows from the first to the second of these.
const TRY_WAIT: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// The most bytes that patches may leave in a guest when they are reverted.
const MAX_KEPT: u64 = 8 << 20;

/// Patches one guest.
///
/// No call waits for the guest's tasks: [`apply`](Self::apply) and [`revert`](Self::revert) start a
/// transition, and [`poll`](Self::poll) drives it whenever that is [`due`](Self::due). Between two
/// calls the guest runs. A guest that is in the middle of a change of its own is tried again for a
/// second or so before a call gives up.
#[derive(Debug, Default)]
pub struct Patcher {
    guest: Option<Guest>,
    patch_memory: PatchMemory,
    /// The dummy patch of `klp_transition_patch`, once it is placed.
    dummy: Option<Gva>,
    /// The patches in the guest, oldest first: the kernel's `klp_patches`.
    patches: Vec<Patch>,
    running: Option<Running>,
    /// The routine that wakes sleepers, once a transition needed it.
    waker: Option<TaskWaker>,
    /// The guest has started another kernel, and patches were lost with the old one. This has not
    /// been reported to the operator yet.
    unreported: Option<PatchError>,
    /// The last patch that was reverted.
    reverted: Option<PatchStatus>,
    /// Forced patches that were reverted before that: their code is still in the guest.
    forced: Vec<PatchStatus>,
    pauses: PauseReport,
    /// Bytes of patches that are gone and may still be used by the guest.
    kept_bytes: u64,
    walks_in_the_pause: bool,
}

/// The transition that is running. There is one at a time, as in the kernel
/// (`klp_transition_patch`).
#[derive(Debug)]
struct Running {
    /// Its patch, by position in the list of patches.
    at: usize,
    transition: Transition,
}

impl Patcher {
    /// A patcher that knows nothing of its guest yet.
    #[must_use]
    pub fn new() -> Patcher {
        Patcher::default()
    }

    /// A patcher that walks stacks in pauses only: for measuring what
    /// [walking them before](introspect::task_list) saves.
    #[must_use]
    pub fn without_prewalk() -> Patcher {
        Patcher {
            walks_in_the_pause: true,
            ..Patcher::default()
        }
    }

    /// The guest's kernel. It is found at the first call and remembered.
    ///
    /// # Errors
    /// [`PatchError::NotReady`] early in boot.
    pub fn kernel<M: Machine>(&mut self, machine: &mut M) -> Result<&Kernel, PatchError> {
        self.guest(machine).map(|guest| &guest.kernel)
    }

    fn guest<M: Machine>(&mut self, machine: &mut M) -> Result<&mut Guest, PatchError> {
        let guest = match self.guest.take() {
            Some(guest) => guest,
            None => Guest::find(machine, &mut self.pauses)?,
        };
        Ok(self.guest.insert(guest))
    }

    /// Starts to apply the livepatch module in `file`; returns the name of the patch.
    ///
    /// # Errors
    /// [`PatchError`], with the guest as it was.
    pub fn apply<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
        mode: Mode,
    ) -> Result<String, PatchError> {
        let module = self.validate(machine, file)?;
        let name = module.name().to_string();
        let guest = self.guest.as_mut().ok_or_else(no_kernel)?;
        let memory = &mut self.patch_memory;
        let patch = prepare::prepare_patch(machine, guest, memory, &module, &self.patches)?;
        self.patches.push(patch);
        let at = self.patches.len() - 1;
        let started = self
            .check_kept_memory()
            .and_then(|()| self.fill_hidden_memory(machine, at))
            .and_then(|()| self.start(machine, at, Direction::Apply, mode));
        if let Err(error) = started {
            // Where the undo failed, the guest may still lead to the patch.
            if !matches!(error, PatchError::Undo { .. }) {
                self.remove_patch(at, None);
            }
            return Err(error);
        }
        if self.reverted.as_ref().is_some_and(|old| old.name == name) {
            self.set_reverted(None);
        }
        Ok(name)
    }

    /// Starts to revert the applied patch `name`, or reverses the transition that applies it.
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
            Some(PatchPhase::Applying) => self.reverse(machine),
            Some(PatchPhase::Applied) => {
                self.check_no_transition()?;
                self.start(machine, at, Direction::Revert, mode)
            }
            _ => Err(PatchError::InTransition(name.into())),
        }
    }

    /// Reverses the running transition of patch `name`, whichever way it goes: tasks that have
    /// switched switch back.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on as before.
    pub fn cancel<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        self.running(name)?;
        self.reverse(machine)
    }

    /// Completes the running transition of patch `name` by switching every task now, wherever it is
    /// (`kernel/livepatch/transition.c: klp_force_transition`).
    ///
    /// The price is consistency: a task that is in an original function stays in it and calls new
    /// ones from there, or the reverse. As it is no longer known which tasks are in the patch's
    /// code, that code is never freed; the patch can be reverted, but not removed.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on as before.
    pub fn force<M: Machine>(&mut self, machine: &mut M, name: &str) -> Result<(), PatchError> {
        let Running { at, transition } = self.running(name)?;
        let (at, direction) = (*at, transition.direction);
        let (step, _) =
            retry_while_busy(|| self.run_step(machine, |context| context.force(direction)))?;
        tracing::warn!(patch = name, "a transition was forced");
        let (older, rest) = self.patches.split_at_mut(at);
        if let Some(patch) = rest.first_mut() {
            patch.forced = true;
            // Nor is it known which tasks are in the code of patches that it replaces.
            if patch.image.replace {
                patch.replaces.iter_mut().for_each(|old| old.stays = true);
                older.iter_mut().for_each(|old| old.forced = true);
            }
        }
        self.record(step);
        Ok(())
    }

    fn position(&mut self, name: &str) -> Result<usize, PatchError> {
        let found = self.patches.iter().position(|patch| patch.name() == name);
        if found.is_none() {
            self.report_lost_patches()?;
        }
        found.ok_or_else(|| PatchError::NoSuchPatch(name.into()))
    }

    /// The running transition, which must be of patch `name`.
    fn running(&mut self, name: &str) -> Result<&mut Running, PatchError> {
        let at = self.position(name)?;
        let running = self.running.as_mut().filter(|running| running.at == at);
        running.ok_or_else(|| PatchError::NoTransition(name.into()))
    }

    /// Sends the fake signal, from `after` the start of the running transition of patch `name`, to
    /// the tasks that have not switched. User tasks return to user mode, and the system calls in
    /// which they sleep restart or return EINTR, as with the kernel's own fake signal; kernel
    /// threads are woken. Stopped and traced tasks get nothing.
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on without the signal.
    pub fn signal<M: Machine>(
        &mut self,
        machine: &mut M,
        name: &str,
        after: Duration,
    ) -> Result<(), PatchError> {
        self.running(name)?;
        let guest = self.guest.as_mut().ok_or_else(no_kernel)?;
        let info = guest.info()?.clone();
        if info.klp.is_none() {
            return Err(PatchError::Unsupported(
                "the fake signal needs CONFIG_LIVEPATCH in the guest: without it no task switches \
                 on its way to user mode",
            ));
        }
        if info.tif.notify_signal.is_none() {
            return Err(PatchError::Unsupported(
                "the fake signal needs TIF_NOTIFY_SIGNAL, which this kernel's code does not show",
            ));
        }
        if self.waker.is_none() {
            let memory = &mut self.patch_memory;
            self.waker = Some(TaskWaker::prepare(machine, guest, memory, &info)?);
        }
        self.running(name)?.transition.signal_after(after);
        Ok(())
    }

    /// Tries to complete the transition that is running, if any
    /// (`kernel/livepatch/transition.c: klp_try_complete_transition`). To be called when that is
    /// [`due`](Self::due).
    ///
    /// # Errors
    /// [`PatchError`]; the transition goes on, and can be polled again or reversed.
    pub fn poll<M: Machine>(&mut self, machine: &mut M) -> Result<(), PatchError> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let direction = running.transition.direction;
        let (pause, result) =
            match self.run_step(machine, |context| context.try_complete(direction)) {
                Ok((step, pause)) => {
                    self.record(step);
                    (Some(pause), Ok(()))
                }
                Err(StepError::Busy(what)) => {
                    tracing::debug!(what, "the guest is busy");
                    (Some(Duration::ZERO), Ok(()))
                }
                Err(StepError::Failed(error)) => (None, Err(error)),
            };
        if let Some(running) = &mut self.running {
            match pause {
                Some(pause) => running.transition.step_taken(pause),
                None => running.transition.step_failed(),
            }
        }
        result
    }

    /// When to [`poll`](Self::poll) next; not before, so that the guest makes progress. `None`: no
    /// transition is running.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.running
            .as_ref()
            .map(|running| running.transition.due())
    }

    /// Every patch that is in the guest, and the last one that was reverted. Before them, the
    /// forced ones that were reverted earlier, without tasks. Stops nothing.
    #[must_use]
    pub fn status(&self) -> Vec<PatchStatus> {
        let transition = |at| {
            let running = self.running.as_ref().filter(|running| running.at == at);
            running.map(|running| &running.transition)
        };
        let patches = self.patches.iter().enumerate();
        let present = patches.map(|(at, patch)| patch.status(transition(at)));
        let all = self.forced.iter().cloned().chain(present);
        all.chain(self.reverted.clone()).collect()
    }

    /// Sets the last patch that was reverted. The one before it is kept if it was forced.
    fn set_reverted(&mut self, status: Option<PatchStatus>) {
        if let Some(mut before) = std::mem::replace(&mut self.reverted, status)
            && before.force
        {
            before.tasks.clear();
            self.forced.push(before);
        }
    }

    /// All pauses so far, of every call.
    #[must_use]
    pub fn pauses(&self) -> &PauseReport {
        &self.pauses
    }

    /// Parses `file`; refuses it if a transition is running, or a patch or a module of that name is
    /// loaded.
    fn validate<M: Machine>(
        &mut self,
        machine: &mut M,
        file: &[u8],
    ) -> Result<LivepatchModule, PatchError> {
        self.report_lost_patches()?;
        self.check_no_transition()?;
        let module = module::parse(file)?;
        let name = module.name();
        if self.patches.iter().any(|patch| patch.name() == name) {
            return Err(PatchError::AlreadyApplied(name.into()));
        }
        self.guest(machine)?.info()?;
        self.check_not_loaded(machine, name)?;
        Ok(module)
    }

    fn check_no_transition(&self) -> Result<(), PatchError> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let patch = self.patches.get(running.at);
        let name = patch.map_or_else(String::new, |patch| patch.name().into());
        Err(PatchError::InTransition(name))
    }

    /// A module of the guest's own with that name would patch the same functions. A guest whose
    /// kernel has panicked is refused as well, but not a core file of one.
    fn check_not_loaded<M: Machine>(
        &mut self,
        machine: &mut M,
        name: &str,
    ) -> Result<(), PatchError> {
        let guest = self.guest.as_mut().ok_or_else(no_kernel)?;
        let never_runs = machine.never_runs();
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        if let Err(error) = guest.check_can_change(paused.memory(), &paused.vcpus) {
            drop(paused);
            return Err(self.forget_replaced_kernel(error));
        }
        if !never_runs {
            guest.check_not_panicked(paused.memory())?;
        }
        // The prewalk of the first step needs to know the modules.
        guest.refresh_modules(paused.memory());
        let loaded = guest.loaded_modules(paused.memory())?;
        if loaded.contains(name) {
            return Err(PatchError::LoadedInGuest(name.into()));
        }
        Ok(())
    }

    /// Forgets the guest's kernel if another one has replaced it; one short pause. If patches are
    /// lost with it, the next request is refused with that. A guest that cannot be paused, as its
    /// VM ends, keeps its kernel. Returns whether the kernel has panicked.
    fn forget_if_replaced<M: Machine>(&mut self, machine: &mut M) -> bool {
        let Some(guest) = &self.guest else {
            return false;
        };
        let Ok(paused) = PauseGuard::begin(machine, &mut self.pauses) else {
            return false;
        };
        let checked = guest.check_running(paused.memory(), &paused.vcpus);
        let panicked = guest.check_not_panicked(paused.memory()).is_err();
        drop(paused);
        if let Err(error) = checked {
            let had_patches = !self.patches.is_empty();
            let error = self.forget_replaced_kernel(error);
            self.unreported = had_patches.then_some(error);
            return false;
        }
        panicked
    }

    /// Fails once after patches were lost in a call that could not report it.
    fn report_lost_patches(&mut self) -> Result<(), PatchError> {
        self.unreported.take().map_or(Ok(()), Err)
    }

    /// Forgets a guest that runs another kernel, with all that was done to the old one. Other
    /// errors change nothing.
    fn forget_replaced_kernel(&mut self, error: PatchError) -> PatchError {
        if matches!(error, PatchError::AnotherKernel(_)) {
            tracing::warn!(%error, patches = self.patches.len(), "the guest's kernel is gone");
            self.guest = None;
            self.patches.clear();
            self.forced.clear();
            self.running = None;
            self.waker = None;
            // What is hidden there stays, and the new kernel does not see it.
            self.patch_memory = PatchMemory::default();
            self.dummy = None;
            self.kept_bytes = 0;
        }
        error
    }

    /// Checks that the patches of the guest do not keep too much memory when they are reverted.
    fn check_kept_memory(&self) -> Result<(), PatchError> {
        let patches = self.patches.iter().map(Patch::kept_bytes);
        let kept = patches.fold(self.kept_bytes, u64::saturating_add);
        if kept <= MAX_KEPT {
            return Ok(());
        }
        let (kept, max) = (self.kept_bytes, MAX_KEPT);
        Err(PatchMemoryError::TooMuchKept { kept, max }.into())
    }

    /// Fills the hidden memory of patch `at`, and places the dummy patch, before the guest maps
    /// them.
    fn fill_hidden_memory<M: Machine>(
        &mut self,
        machine: &mut M,
        at: usize,
    ) -> Result<(), PatchError> {
        let guest = self.guest.as_ref().ok_or_else(no_kernel)?;
        let patch = self.patches.get(at).ok_or_else(no_patch)?;
        prepare::fill_data(machine, &self.patch_memory, patch)?;
        if self.dummy.is_none() {
            let (kernel, info) = (&guest.kernel, guest.info()?);
            self.dummy = dummy_patch::place(machine, kernel, info, &mut self.patch_memory)?;
        }
        Ok(())
    }
}

/// Tries again while the guest is busy.
fn retry_while_busy<T>(mut attempt: impl FnMut() -> Result<T, StepError>) -> Result<T, PatchError> {
    let mut wait = TRY_WAIT.0;
    let mut tries = 1;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(StepError::Failed(error)) => return Err(error),
            Err(StepError::Busy(what)) if tries >= MAX_TRIES => {
                return Err(PatchError::Busy { what, tries });
            }
            Err(StepError::Busy(_)) => {}
        }
        sleep(wait);
        wait = (wait * 2).min(TRY_WAIT.1);
        tries += 1;
    }
}

fn no_kernel() -> PatchError {
    PatchError::NotReady(NotReady::NoImage)
}

/// A position in the list of patches that is none: a bug.
fn no_patch() -> PatchError {
    PatchError::Internal("the patch is not in the list of patches")
}

#[cfg(test)]
mod tests;
