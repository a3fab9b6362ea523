//! One guest's kernel: its symbols, types and unwind data, found once, and its tasks as last read.
//!
//! This module only reads. It must not know what is written to the guest.

pub mod code_set;
pub mod end_of_life;
pub mod kernel_info;
pub mod pause;
pub mod symbolize;
pub mod view;

use std::collections::HashSet;

use introspect::modules;
use introspect::task_list::TaskCache;
use introspect::unwind::Unwinder;
use introspect::{Kernel, PhysMemory, TasksError, VcpuRegs};

use crate::error::{PatchError, StepError};
use crate::guest::code_set::CodeSet;
use crate::guest::end_of_life::has_panicked;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::pause::PauseGuard;
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::report::pause::PauseReport;

/// Why a guest cannot be patched in which a kernel was started with fewer CPUs.
const PARKED: &str = "patching a guest that has started another kernel with fewer CPUs (kexec): \
                      the other vCPUs are still halted in the old kernel";

/// One guest's kernel.
#[derive(Debug)]
pub struct Guest {
    /// The kernel: its symbols, types and page tables.
    pub kernel: Kernel,
    /// Walks the stacks of its tasks.
    pub unwinder: Unwinder,
    /// The tasks and their stacks, as last read.
    pub task_cache: TaskCache,
    /// What patching needs of the kernel, or why this kernel cannot be patched.
    pub info: Result<KernelInfo, PatchError>,
}

impl Guest {
    /// Finds the guest's kernel.
    ///
    /// The long part, reading symbols, types and unwind data, needs no pause: they do not change
    /// once the kernel is up. If it fails, as the page tables that the registers point to may have
    /// gone away meanwhile, it is repeated with the guest paused.
    ///
    /// # Errors
    /// [`PatchError::NotReady`] early in boot.
    pub fn find<M: Machine>(machine: &mut M, meter: &mut PauseReport) -> Result<Guest, PatchError> {
        let paused = PauseGuard::begin(machine, meter)?;
        let vcpus = paused.vcpus.clone();
        paused.resume()?;
        match Guest::read(machine.memory(), &vcpus) {
            Ok(guest) => Ok(guest),
            Err(error) => {
                tracing::debug!(%error, "the kernel is searched again in a pause");
                let paused = PauseGuard::begin(machine, meter)?;
                Guest::read(paused.memory(), &paused.vcpus)
            }
        }
    }

    fn read(memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Guest, PatchError> {
        let kernel = Kernel::find(memory, vcpus)?;
        let unwinder = Unwinder::new(&kernel, &kernel.memory(memory))?;
        let info = KernelInfo::new(&kernel);
        Ok(Guest {
            kernel,
            unwinder,
            task_cache: TaskCache::new(),
            info,
        })
    }

    /// What patching needs of the kernel.
    ///
    /// # Errors
    /// [`PatchError`]: why this kernel cannot be patched.
    pub fn info(&self) -> Result<&KernelInfo, PatchError> {
        self.info.as_ref().map_err(Clone::clone)
    }

    /// Reads the tasks of the paused guest, for a change of it.
    ///
    /// # Errors
    /// [`StepError::Busy`] if its task lists are being changed.
    pub fn view<'a>(
        &'a mut self,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<GuestView<'a>, StepError> {
        self.check_can_change(memory, vcpus)?;
        self.view_for_query(memory, vcpus)
    }

    /// As [`view`](Self::view), for a query: vCPUs may be halted in a kernel that was replaced.
    ///
    /// # Errors
    /// [`StepError::Busy`] if its task lists are being changed.
    pub fn view_for_query<'a>(
        &'a mut self,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<GuestView<'a>, StepError> {
        self.check_running(memory, vcpus)?;
        self.refresh_modules(memory);
        let Guest {
            kernel,
            unwinder,
            task_cache,
            ..
        } = self;
        GuestView::new(kernel, unwinder, task_cache, memory, vcpus)
    }

    /// Reads the tasks of a guest that cannot go on, for a query, although its task lists may be in
    /// the middle of a change. Also returns what shows that they are.
    ///
    /// # Errors
    /// [`StepError::Failed`] if the lists are corrupt.
    pub fn view_in_mid_change<'a>(
        &'a mut self,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<(GuestView<'a>, Vec<TasksError>), StepError> {
        self.check_running(memory, vcpus)?;
        self.refresh_modules(memory);
        let own = self.kernel.memory(memory);
        let (cache, doubts) = TaskCache::read_in_mid_change(&self.kernel, &own, vcpus)?;
        self.task_cache = cache;
        let view = GuestView::of_cache(
            &self.kernel,
            &self.unwinder,
            &self.task_cache,
            memory,
            vcpus,
        );
        Ok((view, doubts))
    }

    /// Checks that the guest still runs this kernel, and that all its vCPUs do. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::AnotherKernel`] if it runs another one, and [`PatchError::Unsupported`] if
    /// vCPUs are halted in another one.
    pub fn check_can_change(
        &self,
        memory: &dyn PhysMemory,
        vcpus: &[VcpuRegs],
    ) -> Result<(), PatchError> {
        self.check_running(memory, vcpus)?;
        let own = self.kernel.memory(memory);
        match self.kernel.parked_vcpus(&own, vcpus).is_empty() {
            true => Ok(()),
            false => Err(PatchError::Unsupported(PARKED)),
        }
    }

    /// Checks that the guest's kernel has not panicked. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::Panicked`].
    pub fn check_not_panicked(&self, memory: &dyn PhysMemory) -> Result<(), PatchError> {
        match has_panicked(&self.kernel, &self.kernel.memory(memory)) {
            true => Err(PatchError::Panicked),
            false => Ok(()),
        }
    }

    /// Checks that the guest still runs this kernel. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::AnotherKernel`] if it runs another one.
    pub fn check_running(
        &self,
        memory: &dyn PhysMemory,
        vcpus: &[VcpuRegs],
    ) -> Result<(), PatchError> {
        match self.kernel.is_running(&self.kernel.memory(memory), vcpus) {
            true => Ok(()),
            false => Err(PatchError::AnotherKernel(self.kernel.release.clone())),
        }
    }

    /// Gives the unwinder the modules that are loaded now. Only while paused.
    pub fn refresh_modules(&mut self, memory: &dyn PhysMemory) {
        // A module that is being loaded or unloaded makes the stacks with its code on them
        // unreliable, and no others.
        if let Err(error) = (self.unwinder).refresh(&self.kernel, &self.kernel.memory(memory)) {
            tracing::debug!(%error, "the guest's modules cannot be read now");
        }
    }

    /// Walks stacks while the guest runs, and tags the tasks that are clear of `code`, so that the
    /// next pause is short.
    pub fn prewalk(&mut self, memory: &dyn PhysMemory, code: &CodeSet) {
        let memory = self.kernel.memory(memory);
        self.task_cache
            .prewalk(&self.kernel, &self.unwinder, &memory);
        code.tag_clear_tasks(&mut self.task_cache);
    }

    /// The names of the modules that the guest has loaded. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::Guest`] if their list cannot be read.
    pub fn loaded_modules(&self, memory: &dyn PhysMemory) -> Result<HashSet<String>, PatchError> {
        let memory = self.kernel.memory(memory);
        let loaded = modules::list(&self.kernel, &memory)?;
        Ok(loaded.into_iter().map(|module| module.name).collect())
    }
}
