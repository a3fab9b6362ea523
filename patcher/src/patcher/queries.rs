//! Queries of a guest: its tasks, stacks and symbols, and the dry run of a patch.
//!
//! Each takes one short pause, repeated while the guest is busy, and changes nothing in the guest.

use std::borrow::Cow;
use std::time::Duration;

use introspect::modules;
use introspect::task_list::TaskCache;
use introspect::{KallsymsEntry, Kernel, Stack, Task, TasksError, VcpuRegs};

use crate::error::{PatchError, StepError};
use crate::guest::end_of_life::EndOfLife;
use crate::guest::pause::PauseGuard;
use crate::guest::symbolize::{LoadedModules, Symbolizer};
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::patcher::dry_run::DryRun;
use crate::patcher::{MAX_TRIES, Patcher, no_kernel, retry_while_busy};
use crate::report::check::CheckReport;
use crate::report::pause::PauseReport;
use crate::report::reading::Reading;
use crate::report::stack::TaskStack;

/// The kernel that a guest runs.
#[derive(Clone, Copy, Debug)]
pub struct KernelInUse<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// It has panicked, and never runs a task again.
    pub panicked: bool,
}

impl Patcher {
    /// Every task of the guest, all read in one pause.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn tasks<M: Machine>(&mut self, machine: &mut M) -> Result<Reading<Vec<Task>>, PatchError> {
        self.observe(machine, |view| Ok(view.tasks().cloned().collect()))
    }

    /// The stack of the task with thread id `pid`; 0 is the first CPU's idle task.
    ///
    /// # Errors
    /// [`PatchError::NoSuchTask`] if there is none, and others.
    pub fn stack<M: Machine>(
        &mut self,
        machine: &mut M,
        pid: i32,
    ) -> Result<Reading<TaskStack>, PatchError> {
        let read = self.observe(machine, |view| {
            let mut each = view.cached().iter();
            let cached = each.find(|cached| cached.task.pid == pid);
            let cached = cached.ok_or(PatchError::NoSuchTask(pid))?;
            let stack = view.stack(cached).into_owned();
            Ok((cached.task.clone(), stack, view.loaded_modules()))
        })?;
        let (task, stack, loaded) = read.value;
        Ok(Reading {
            value: self.symbolizer(loaded)?.stack(&task, &stack),
            warning: read.warning,
        })
    }

    /// The stacks of all tasks, all read in one pause.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn stacks<M: Machine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Reading<Vec<TaskStack>>, PatchError> {
        let read = self.observe(machine, |view| {
            let stacks = view.stacks().into_iter().map(Cow::into_owned);
            let each: Vec<(Task, Stack)> = view.tasks().cloned().zip(stacks).collect();
            Ok((each, view.loaded_modules()))
        })?;
        let (stacks, loaded) = read.value;
        let symbolizer = self.symbolizer(loaded)?;
        let each = stacks.iter();
        let value = each.map(|(task, stack)| symbolizer.stack(task, stack));
        Ok(Reading {
            value: value.collect(),
            warning: read.warning,
        })
    }

    fn symbolizer(&self, loaded: LoadedModules) -> Result<Symbolizer<'_>, PatchError> {
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
        self.in_use(machine, Patcher::symbols_once)
    }

    fn symbols_once<M: Machine>(
        &mut self,
        machine: &mut M,
    ) -> Result<Vec<KallsymsEntry>, PatchError> {
        self.guest(machine)?;
        let guest = self.guest.as_ref().ok_or_else(no_kernel)?;
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        guest.check_running(paused.memory(), &paused.vcpus)?;
        let kernel = &guest.kernel;
        let others = modules::modules_and_runtime(kernel, &kernel.memory(paused.memory()));
        paused.resume()?;
        let others = others?;
        let core = kernel.symbols.iter().map(|symbol| KallsymsEntry {
            gva: symbol.gva,
            letter: symbol.letter,
            name: symbol.name.to_owned(),
            module: None,
        });
        Ok(core.chain(others).collect())
    }

    /// The guest's kernel, after a check in a short pause that the guest still runs it: it can
    /// start another one by itself (kexec), which is then found. If patches were lost with the old
    /// one, the next query or change reports that.
    ///
    /// # Errors
    /// [`PatchError::NotReady`] early in boot, also in that of another kernel.
    pub fn kernel_in_use<M: Machine>(
        &mut self,
        machine: &mut M,
    ) -> Result<KernelInUse<'_>, PatchError> {
        let panicked = self.forget_if_replaced(machine);
        let kernel = self.kernel(machine)?;
        Ok(KernelInUse { kernel, panicked })
    }

    /// Holds the guest paused while `work` reads its memory and registers. Returns what `work`
    /// returned, and the length of the pause. The kernel is `None` if it has not been found, as
    /// happens early in boot.
    ///
    /// # Errors
    /// [`PatchError`] if the guest cannot be paused or resumed.
    pub fn hold<M: Machine, T>(
        &mut self,
        machine: &mut M,
        work: impl FnOnce(Option<&Kernel>, &M::Memory, &[VcpuRegs]) -> T,
    ) -> Result<(T, Duration), PatchError> {
        if let Err(error) = self.kernel_in_use(machine) {
            tracing::debug!(%error, "the guest is paused without its kernel being known");
        }
        let paused = PauseGuard::begin(machine, &mut self.pauses)?;
        let kernel = self.guest.as_ref().map(|guest| &guest.kernel);
        let done = work(kernel, paused.memory(), &paused.vcpus);
        let length = paused.resume()?;
        Ok((done, length))
    }

    /// Runs `query` in one short pause, and tries again while the guest is busy. A guest that is
    /// busy and cannot go on is read as it is, with a warning.
    fn observe<M: Machine, T>(
        &mut self,
        machine: &mut M,
        query: impl Fn(&GuestView<'_>) -> Result<T, PatchError>,
    ) -> Result<Reading<T>, PatchError> {
        self.in_use(machine, |patcher, machine| {
            patcher.observe_once(machine, &query)
        })
    }

    /// Runs `query` on the kernel in use: again, if it fails as the guest has started another one.
    /// If patches are lost, that is reported instead.
    fn in_use<M: Machine, T>(
        &mut self,
        machine: &mut M,
        query: impl Fn(&mut Patcher, &mut M) -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        self.report_lost_patches()?;
        let had_patches = !self.patches.is_empty();
        match query(self, machine) {
            Err(error @ PatchError::AnotherKernel(_)) => {
                let error = self.forget_replaced_kernel(error);
                if had_patches {
                    return Err(error);
                }
                // There were no patches to lose: the new kernel answers the query.
                query(self, machine)
            }
            result => result,
        }
    }

    fn observe_once<M: Machine, T>(
        &mut self,
        machine: &mut M,
        query: impl Fn(&GuestView<'_>) -> Result<T, PatchError>,
    ) -> Result<Reading<T>, PatchError> {
        self.guest(machine)?;
        let Patcher { guest, pauses, .. } = self;
        let guest = guest.as_mut().ok_or_else(no_kernel)?;
        let mut end = EndOfLife::new(machine.never_runs());
        let mut tries = 0;
        retry_while_busy(|| {
            tries += 1;
            // A task's name can be changed by another task, which no counter shows: a query reads
            // all tasks again.
            guest.task_cache = TaskCache::new();
            let mut paused = PauseGuard::begin(machine, pauses)?;
            let (memory, vcpus) = (paused.memory(), &paused.vcpus);
            let run = |view: &GuestView<'_>| (query(view), view.cached().len(), view.walked());
            let viewed = guest.view_for_query(memory, vcpus);
            let viewed = viewed.map(|view| (run(&view), None));
            let ((result, tasks, walked), warning) = match viewed {
                Err(StepError::Busy(what)) => {
                    let (kernel, is_last) = (&guest.kernel, tries >= MAX_TRIES);
                    let reason = end.reason(kernel, &kernel.memory(memory), vcpus, is_last);
                    let reason = reason.ok_or(StepError::Busy(what))?;
                    let (view, doubts) = guest.view_in_mid_change(memory, vcpus)?;
                    (run(&view), warning(reason, &doubts))
                }
                viewed => viewed?,
            };
            paused.note(tasks, walked);
            let value = result?;
            Ok(Reading { value, warning })
        })
    }

    /// The dry run of [`apply`](Self::apply): what it would do now with the module in `file`.
    /// Writes nothing, so `machine` may be a [`ReadOnlyMachine`](crate::ReadOnlyMachine).
    ///
    /// # Errors
    /// [`PatchError`], as from `apply`.
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
            guest.prewalk(machine.memory(), &dry_run.code_to_leave());
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

/// What to tell of tasks that were read in the middle of a change, in a guest that cannot go on for
/// this reason; `None` if nothing speaks against them.
fn warning(reason: &str, doubts: &[TasksError]) -> Option<String> {
    let doubts: Vec<String> = doubts.iter().map(ToString::to_string).collect();
    (!doubts.is_empty()).then(|| {
        format!(
            "{}, and {reason}: tasks may be missing here, or be listed although they have ended",
            doubts.join(", ")
        )
    })
}

#[cfg(test)]
mod tests;
