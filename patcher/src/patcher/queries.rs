//! What can be asked of a guest: each question is a short pause, and changes nothing.

use std::borrow::Cow;
use std::time::Duration;

use introspect::modules;
use introspect::task_list::TaskCache;
use introspect::{KallsymsEntry, Kernel, Stack, Task, VcpuRegs};

use crate::error::PatchError;
use crate::guest::pause::PauseGuard;
use crate::guest::symbolize::{LoadedModules, Symbolizer};
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::patcher::dry_run::DryRun;
use crate::patcher::{Patcher, not_found, patiently};
use crate::report::patch::{CheckReport, PauseReport};
use crate::report::stack::TaskStack;

impl Patcher {
    /// Every task of the guest, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn tasks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<Task>, PatchError> {
        self.look(machine, |look| Ok(look.tasks().cloned().collect()))
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
        let (task, stack, loaded) = self.look(machine, |look| {
            let seen = look.cached().iter().find(|seen| seen.task.pid == pid);
            let seen = seen.ok_or(PatchError::NoSuchTask(pid))?;
            let stack = look.stack(seen).into_owned();
            Ok((seen.task.clone(), stack, look.loaded()))
        })?;
        Ok(self.names(loaded)?.stack(&task, &stack))
    }

    /// The stacks of all tasks, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn stacks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<TaskStack>, PatchError> {
        let (stacks, loaded) = self.look(machine, |look| {
            let stacks = look.stacks().into_iter().map(Cow::into_owned);
            let each: Vec<(Task, Stack)> = look.tasks().cloned().zip(stacks).collect();
            Ok((each, look.loaded()))
        })?;
        let names = self.names(loaded)?;
        let each = stacks.iter();
        Ok(each.map(|(task, stack)| names.stack(task, stack)).collect())
    }

    fn names(&self, loaded: LoadedModules) -> Result<Symbolizer<'_>, PatchError> {
        let guest = self.guest.as_ref().ok_or_else(not_found)?;
        Ok(Symbolizer::new(
            &guest.kernel,
            &guest.unwinder,
            loaded,
            &self.patches,
        ))
    }

    /// Every symbol of the guest, as its `/proc/kallsyms` lists them.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn symbols<M: Machine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Vec<KallsymsEntry>, PatchError> {
        self.guest(machine)?;
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        let kernel = &self.guest.as_ref().ok_or_else(not_found)?.kernel;
        let behind = modules::modules_and_runtime(kernel, &kernel.memory(paused.memory()));
        paused.resume()?;
        let behind = behind.map_err(|error| PatchError::Guest(error.to_string()))?;
        let core = kernel.symbols.iter().map(|symbol| KallsymsEntry {
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
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        let kernel = self.guest.as_ref().map(|guest| &guest.kernel);
        let done = work(kernel, paused.memory(), &paused.vcpus);
        let length = paused.resume()?;
        Ok((done, length))
    }

    /// One short pause for one question, asked again while the guest is busy.
    fn look<M: Machine, T>(
        &mut self,
        machine: &mut M,
        question: impl Fn(&GuestView<'_>) -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        let had_patches = !self.patches.is_empty();
        match self.look_once(machine, &question) {
            Err(error @ PatchError::AnotherKernel(_)) => {
                let error = self.lost(error);
                if had_patches {
                    return Err(error);
                }
                // Nobody loses anything by it: the new kernel is asked.
                self.look_once(machine, &question)
            }
            answer => answer,
        }
    }

    fn look_once<M: Machine, T>(
        &mut self,
        machine: &mut M,
        question: impl Fn(&GuestView<'_>) -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        self.guest(machine)?;
        let Patcher { guest, pauses, .. } = self;
        let guest = guest.as_mut().ok_or_else(not_found)?;
        patiently(|| {
            // A task's name can be changed by another, and that shows in no counter: who asks sees everything anew.
            guest.task_cache = TaskCache::new();
            let mut paused = PauseGuard::begin(machine, pauses)?;
            let (answer, tasks, walked) = {
                let look = guest.look(paused.memory(), &paused.vcpus)?;
                (question(&look), look.cached().len(), look.walked())
            };
            paused.saw(tasks, walked);
            Ok(answer?)
        })
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
        let trial = DryRun::prepare(machine, guest, places, &module, patches)?;
        let mut meter = PauseReport::default();
        let found = patiently(|| {
            guest.walk_ahead(machine.memory(), &trial.watch());
            let mut paused = PauseGuard::begin(machine, &mut meter)?;
            let (tasks, step, walked) = trial.step(guest, paused.memory(), &paused.vcpus)?;
            paused.saw(tasks.len(), walked);
            Ok((tasks, step))
        });
        trial.forget(guest);
        pauses.merge(&meter);
        let (tasks, step) = found?;
        Ok(trial.report(&tasks, step, meter))
    }
}
