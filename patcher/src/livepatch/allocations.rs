//! The guest memory of one patch, allocated before the patch is linked for it.
//!
//! This module knows what a patch needs memory for; it writes nothing.

use introspect::{Gva, GvaRange, Kernel};

use crate::error::{PatchError, unexpected};
use crate::guest::kernel_info::KernelInfo;
use crate::machine::Machine;
use crate::memory::{Allocation, PatchMemory, Request, Usage};
use crate::module::{LoadAddresses, RegionSize, Sizes};
use crate::registration::module_struct::ModuleMemory;
use crate::transition::pending_tasks;
use crate::x86::entry_stub::StateSource;

/// The alignment of the stubs, in bytes.
const STUB_ALIGN: u64 = 16;

/// Allocates memory of a guest, and notes what it has allocated so that all of it can be freed when
/// something fails.
pub struct Allocator<'a, M> {
    /// The machine to which hidden memory is added.
    pub machine: &'a mut M,
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// What patching needs of the kernel.
    pub info: &'a KernelInfo,
    /// The memory.
    pub patch_memory: &'a mut PatchMemory,
    allocated: Vec<Allocation>,
}

impl<'a, M: Machine> Allocator<'a, M> {
    /// One that has allocated nothing. Memory that no reader in the guest can read any more is free
    /// again.
    ///
    /// # Errors
    /// [`PatchError::Guest`] if the guest's count of grace periods cannot be read.
    pub fn new(
        machine: &'a mut M,
        kernel: &'a Kernel,
        info: &'a KernelInfo,
        patch_memory: &'a mut PatchMemory,
    ) -> Result<Allocator<'a, M>, PatchError> {
        let allocator = Allocator {
            machine,
            kernel,
            info,
            patch_memory,
            allocated: Vec::new(),
        };
        let now = allocator.grace_periods()?;
        allocator.patch_memory.reclaim(now);
        Ok(allocator)
    }

    /// `rcu_state.gp_seq`.
    fn grace_periods(&self) -> Result<u64, PatchError> {
        let memory = self.kernel.memory(self.machine.memory());
        Ok(memory.u64(self.info.registration.gp_seq)?)
    }

    /// Allocates memory for `usage`.
    ///
    /// # Errors
    /// [`PatchError::Memory`].
    pub fn allocate(&mut self, usage: Usage, request: Request) -> Result<Allocation, PatchError> {
        let table = self.info.fixmap_table;
        let memory = &mut self.patch_memory;
        match memory.allocate(self.machine, self.kernel, table, usage, request) {
            Ok(allocation) => {
                self.allocated.push(allocation);
                Ok(allocation)
            }
            Err(error) => {
                let now = self.grace_periods()?;
                Err(self.patch_memory.explain(error, now))
            }
        }
    }

    /// Frees all that was allocated.
    pub fn free_all(self) {
        for allocation in self.allocated {
            self.patch_memory.free(allocation);
        }
    }
}

/// The memory of a patch, and how it is used.
#[derive(Clone, Copy, Debug)]
pub struct Allocations {
    /// For the module's code, and the stubs after it.
    pub code: Allocation,
    /// For its constants.
    pub rodata: Allocation,
    /// For its data, its `struct module` included.
    pub data: Allocation,
    /// For the table of pending tasks, in a guest that keeps no patch states.
    pub table: Option<Allocation>,
    /// How its stubs learn a task's patch state.
    pub source: StateSource,
    /// The offset of the stubs in `code`.
    pub stubs_at: u64,
    stubs_len: u64,
}

impl Allocations {
    /// Memory for a module of these sizes with this many functions.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn new<M: Machine>(
        allocator: &mut Allocator<'_, M>,
        sizes: Sizes,
        functions: u64,
    ) -> Result<Allocations, PatchError> {
        let (kernel, info) = (allocator.kernel, allocator.info);
        let table = match info.klp {
            Some(_) => None,
            None => {
                let tasks = kernel.symbols.address("nr_threads")?;
                let tasks = kernel.memory(allocator.machine.memory()).u32(tasks)?;
                let request = pending_tasks::table_request(tasks.into());
                Some(allocator.allocate(Usage::Data, request)?)
            }
        };
        let data = allocator.allocate(Usage::Data, request(sizes.data))?;
        let rodata = allocator.allocate(Usage::RoData, request(sizes.rodata))?;
        let source = state_source(info, table)?;
        let stubs_at = sizes.code.len.next_multiple_of(STUB_ALIGN);
        let stubs_len = source.max_stub_len() * functions;
        let code_request = Request {
            len: stubs_at.saturating_add(stubs_len),
            align: sizes.code.align.max(STUB_ALIGN),
        };
        let code = allocator.allocate(Usage::Code, code_request)?;
        Ok(Allocations {
            code,
            rodata,
            data,
            table,
            source,
            stubs_at,
            stubs_len,
        })
    }

    /// The addresses to link the module for.
    #[must_use]
    pub fn load_addresses(&self) -> LoadAddresses {
        LoadAddresses {
            code: self.code.range.start,
            rodata: self.rodata.range.start,
            data: self.data.range.start,
        }
    }

    /// The stubs.
    #[must_use]
    pub fn stubs(&self) -> GvaRange {
        let start: Gva = self.code.range.start.add(self.stubs_at);
        GvaRange::new(start, start.add(self.stubs_len))
    }

    /// The memory as the guest's kernel is told of it.
    #[must_use]
    pub fn module_memory(&self) -> ModuleMemory {
        ModuleMemory {
            text: self.code.range,
            rodata: self.rodata.range,
            data: self.data.range,
        }
    }
}

fn request(size: RegionSize) -> Request {
    let RegionSize { len, align } = size;
    Request { len, align }
}

/// How the stubs of a patch learn the running task's patch state: from `task_struct.patch_state`,
/// or from `table` in a guest that keeps no patch states.
///
/// # Errors
/// [`PatchError::Guest`] for an offset that no kernel has.
pub fn state_source(
    info: &KernelInfo,
    table: Option<Allocation>,
) -> Result<StateSource, PatchError> {
    if let Some(table) = table {
        return Ok(StateSource::PendingTasks(pending_tasks::table_in(table)));
    }
    let offset = info.klp.as_ref().map(|klp| klp.patch_state.offset);
    let offset = offset.and_then(|offset| u32::try_from(offset).ok());
    offset
        .map(StateSource::PatchState)
        .ok_or_else(|| unexpected("the offset of task_struct.patch_state does not fit 32 bits"))
}
