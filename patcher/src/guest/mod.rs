//! What is known of one guest's kernel, found once: symbols, types, unwind data, and what patching needs of them.

pub mod code_set;
pub mod kernel_info;
pub mod pause;
pub mod symbolize;
pub mod view;

use std::collections::HashSet;

use introspect::modules;
use introspect::task_list::TaskCache;
use introspect::unwind::Unwinder;
use introspect::{Kernel, PhysMemory, VcpuRegs};

use crate::error::PatchError;
use crate::error::StepError;
use crate::guest::code_set::CodeSet;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::pause::PauseGuard;
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::report::pause::PauseReport;

/// One guest's kernel.
#[derive(Debug)]
pub struct Guest {
    /// Symbols, types, page tables.
    pub kernel: Kernel,
    /// Stacks.
    pub unwinder: Unwinder,
    /// Tasks and their stacks, as last seen.
    pub task_cache: TaskCache,
    /// What patching needs, or why this kernel cannot be patched.
    pub info: Result<KernelInfo, PatchError>,
}

impl Guest {
    /// First contact.
    ///
    /// The long part of it, reading symbols, types and unwind data, needs no pause: they do not change once the kernel is up. Only
    /// when that fails, because the registers' page tables went away meanwhile, is it done again with the guest stopped.
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
                tracing::debug!(%error, "first contact needs a pause");
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

    /// What patching needs.
    ///
    /// # Errors
    /// Why this kernel cannot be patched.
    pub fn info(&self) -> Result<&KernelInfo, PatchError> {
        self.info.as_ref().map_err(Clone::clone)
    }

    /// Looks at the paused guest.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn view<'a>(
        &'a mut self,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<GuestView<'a>, StepError> {
        self.check_running(memory, vcpus)?;
        self.refresh(memory);
        let Guest {
            kernel,
            unwinder,
            task_cache,
            ..
        } = self;
        GuestView::take(kernel, unwinder, task_cache, memory, vcpus)
    }

    /// The guest still runs this kernel. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::AnotherKernel`].
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

    /// Learns which modules there are. Only while paused.
    pub fn refresh(&mut self, memory: &dyn PhysMemory) {
        // A module that is being loaded or unloaded makes stacks through it unreliable, and no others.
        if let Err(error) = (self.unwinder).refresh(&self.kernel, &self.kernel.memory(memory)) {
            tracing::debug!(%error, "the guest's modules cannot be read now");
        }
    }

    /// Walks stacks while the guest runs, and looks for the code of `codes` on them, so that the next look is short.
    pub fn prewalk(&mut self, memory: &dyn PhysMemory, codes: &CodeSet) {
        let memory = self.kernel.memory(memory);
        self.task_cache
            .prewalk(&self.kernel, &self.unwinder, &memory);
        codes.tag_ahead(&mut self.task_cache);
    }

    /// Names of the modules that the guest has loaded. Only while paused.
    ///
    /// # Errors
    /// [`PatchError::Guest`].
    pub fn loaded_modules(&self, memory: &dyn PhysMemory) -> Result<HashSet<String>, PatchError> {
        let memory = self.kernel.memory(memory);
        let loaded = modules::list(&self.kernel, &memory)?;
        Ok(loaded.into_iter().map(|module| module.name).collect())
    }
}
