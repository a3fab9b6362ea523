//! All tasks of a guest: processes, threads, kernel threads and idle tasks.
//!
//! This module knows which lists and variables lead to tasks, the lock that guards the lists, and
//! which task each vCPU runs; it must not know what is on a task's stack. Results hold only for the
//! pause in which they were read.
//!
//! This module follows `include/linux/sched/signal.h: for_each_process_thread` and `kernel/fork.c:
//! copy_process`.

mod cache;
mod counts;
mod entry;
mod error;
mod fingerprint;
mod on_cpu;
mod revalidate;

use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task::Task;
use crate::vcpu::VcpuRegs;

pub use cache::TaskCache;
pub use entry::CachedTask;
pub use error::{MAX_TASKS, TasksError};

/// All tasks, each with the vCPU that runs it: threads in the order of the lists, then idle tasks
/// by CPU, then any task that a vCPU still runs although it has left the lists (it is exiting).
///
/// Reads the list of processes, the thread list of each, `idle_threads`, and what the registers of
/// the vCPUs lead to. The lists change only under `tasklist_lock` held for writing. A task changes
/// its own fields under no lock that can be checked, so a name can be half old and half new. Linear
/// in the number of tasks, of which there are at most [`MAX_TASKS`].
///
/// # Errors
/// [`TasksError::Busy`] when the lists are being changed; any other when they are corrupt.
pub fn read(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    vcpus: &[VcpuRegs],
) -> Result<Vec<Task>, TasksError> {
    let mut cache = TaskCache::uncached();
    cache.list_tasks(kernel, memory, vcpus)?;
    Ok(cache.into_tasks())
}
