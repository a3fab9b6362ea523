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
use crate::patcher::{Patcher, no_kernel, retry_while_busy};
use crate::report::check::CheckReport;
use crate::report::pause::PauseReport;
use crate::report::stack::TaskStack;

impl Patcher {
    /// Every task of the guest, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn tasks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<Task>, PatchError> {
        self.view(machine, |view| Ok(view.tasks().cloned().collect()))
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
        let (task, stack, loaded) = self.view(machine, |view| {
            let seen = view.cached().iter().find(|seen| seen.task.pid == pid);
            let seen = seen.ok_or(PatchError::NoSuchTask(pid))?;
            let stack = view.stack(seen).into_owned();
            Ok((seen.task.clone(), stack, view.loaded()))
        })?;
        Ok(self.names(loaded)?.stack(&task, &stack))
    }

    /// The stacks of all tasks, of one moment.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn stacks<M: Machine>(&mut self, machine: &mut M) -> Result<Vec<TaskStack>, PatchError> {
        let (stacks, loaded) = self.view(machine, |view| {
            let stacks = view.stacks().into_iter().map(Cow::into_owned);
            let each: Vec<(Task, Stack)> = view.tasks().cloned().zip(stacks).collect();
            Ok((each, view.loaded()))
        })?;
        let names = self.names(loaded)?;
        let each = stacks.iter();
        Ok(each.map(|(task, stack)| names.stack(task, stack)).collect())
    }

    fn names(&self, loaded: LoadedModules) -> Result<Symbolizer<'_>, PatchError> {
        let guest = self.guest.as_ref().ok_or_else(no_kernel)?;
        Ok(Symbolizer::new(
            &guest.kernel,
            &guest.unwinder,
            loaded,
            self.patches.iter().map(|patch| &patch.image).collect(),
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
        let kernel = &self.guest.as_ref().ok_or_else(no_kernel)?.kernel;
        let behind = modules::modules_and_runtime(kernel, &kernel.memory(paused.memory()));
        paused.resume()?;
        let behind = behind?;
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
    fn view<M: Machine, T>(
        &mut self,
        machine: &mut M,
        question: impl Fn(&GuestView<'_>) -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        let had_patches = !self.patches.is_empty();
        match self.look_once(machine, &question) {
            Err(error @ PatchError::AnotherKernel(_)) => {
                let error = self.forget_replaced_kernel(error);
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
        let guest = guest.as_mut().ok_or_else(no_kernel)?;
        retry_while_busy(|| {
            // A task's name can be changed by another, and that shows in no counter: who asks sees everything anew.
            guest.task_cache = TaskCache::new();
            let mut paused = PauseGuard::begin(machine, pauses)?;
            let (answer, tasks, walked) = {
                let view = guest.view(paused.memory(), &paused.vcpus)?;
                (question(&view), view.cached().len(), view.walked())
            };
            paused.note(tasks, walked);
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
        let module = self.validate(machine, file)?;
        let Patcher {
            guest,
            patch_memory,
            dummy,
            patches,
            pauses,
            ..
        } = self;
        let guest = guest.as_mut().ok_or_else(no_kernel)?;
        let dry_run = DryRun::prepare(machine, guest, (patch_memory, *dummy), &module, patches)?;
        let mut meter = PauseReport::default();
        let found = retry_while_busy(|| {
            guest.prewalk(machine.memory(), &dry_run.codes());
            let mut paused = PauseGuard::begin(machine, &mut meter)?;
            let (tasks, step, walked) = dry_run.step(guest, paused.memory(), &paused.vcpus)?;
            paused.note(tasks.len(), walked);
            Ok((tasks, step))
        });
        dry_run.remove_from(guest);
        pauses.merge(&meter);
        let (tasks, step) = found?;
        Ok(dry_run.report(&tasks, step, meter))
    }
}
