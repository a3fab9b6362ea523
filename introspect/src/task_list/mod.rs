//! All tasks of a guest: processes, threads, kernel threads and idle tasks.
//!
//! Knows what can be in the way of listing them, and the lock that guards the lists; the lists themselves are [`crate::task_list::cache`]'s.
//! Only to be trusted while all vCPUs are paused.
//!
//! Follows `include/linux/sched/signal.h: for_each_process_thread` and `kernel/fork.c: copy_process`.

pub mod cache;
mod counts;
mod entry;
mod error;
mod fingerprint;
pub mod on_cpu;
mod revalidate;

use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task::Task;
use crate::task_list::cache::TaskCache;
use crate::vcpu::VcpuRegs;

pub use error::{MAX_TASKS, TasksError};

/// All tasks, each with the vCPU that runs it: threads in the order of the lists, then idle tasks by CPU, then any task that a
/// CPU still runs although it has left the lists (it is about to die).
///
/// Reads the list of processes, each one's list of threads, `idle_threads`, and what the vCPUs' registers lead to. The lists change only
/// under `tasklist_lock` held for writing. What a task changes of itself, it changes under no lock that could be looked at: a name can be
/// half old and half new. Linear in the number of tasks, of which there are at most [`MAX_TASKS`].
///
/// # Errors
/// [`TasksError::Busy`] when the lists are being changed; the others when they are broken.
pub fn read(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    vcpus: &[VcpuRegs],
) -> Result<Vec<Task>, TasksError> {
    let mut survey = TaskCache::once();
    survey.list_tasks(kernel, memory, vcpus)?;
    Ok(survey.into_tasks())
}
