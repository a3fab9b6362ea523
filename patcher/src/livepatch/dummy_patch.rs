//! The dummy patch to which `klp_transition_patch` points while a patch of outpatch is in the
//! guest.
//!
//! It is a `struct klp_patch` of zeroes with empty lists: the guest's own livepatching answers
//! -EBUSY, and code that walks the patch finds nothing.

use introspect::{Gva, Kernel};

use crate::error::PatchError;
use crate::guest::kernel_info::KernelInfo;
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{Allocation, PatchMemory, Request, Usage};

/// Allocates memory for the dummy patch; `None` in a guest without livepatching, which needs none.
///
/// # Errors
/// [`PatchError::Memory`].
pub fn allocate<M: Machine>(
    machine: &mut M,
    kernel: &Kernel,
    info: &KernelInfo,
    memory: &mut PatchMemory,
) -> Result<Option<Allocation>, PatchError> {
    let Some(klp) = &info.klp else {
        return Ok(None);
    };
    let request = Request {
        len: klp.patch_size,
        align: 64,
    };
    memory
        .allocate(machine, kernel, info.fixmap_table, Usage::Data, request)
        .map(Some)
}

/// Allocates the dummy patch and fills it, in memory that the guest does not map yet; returns its
/// address.
///
/// # Errors
/// [`PatchError`], with nothing allocated.
pub fn place<M: Machine>(
    machine: &mut M,
    kernel: &Kernel,
    info: &KernelInfo,
    memory: &mut PatchMemory,
) -> Result<Option<Gva>, PatchError> {
    let allocation = allocate(machine, kernel, info, memory)?;
    let (Some(klp), Some(allocation)) = (&info.klp, allocation) else {
        return Ok(None);
    };
    let at = allocation.range.start;
    let mut writes = WriteBatch::new();
    let zeroes = vec![0; usize::try_from(klp.patch_size).unwrap_or_default()];
    memory.plan_part(allocation, at, &zeroes, &mut writes);
    for list in &klp.patch_lists {
        let head = list.of(at);
        let link = head.0.to_le_bytes();
        memory.plan_part(allocation, head, &[link, link].concat(), &mut writes);
    }
    if let Err(error) = writes.commit(machine) {
        memory.free(allocation);
        return Err(error);
    }
    Ok(Some(at))
}
