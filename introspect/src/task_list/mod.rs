//! All tasks of a guest: processes, threads, kernel threads and idle tasks.
//!
//! Knows what can be in the way of listing them, and the lock that guards the lists; the lists themselves are [`crate::task_list::cache`]'s.
//! Only to be trusted while all vCPUs are paused.
//!
//! Follows `include/linux/sched/signal.h: for_each_process_thread` and `kernel/fork.c: copy_process`.

pub mod cache;
mod entry;
mod fingerprint;
pub mod on_cpu;
mod revalidate;

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::kernel::stack_areas::StackAreaError;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::symbols::SymbolError;
use crate::task::Task;
use crate::task_list::cache::TaskCache;
use crate::vcpu::VcpuRegs;

/// More tasks than any guest has: a kernel with 128 GiB allows itself about so many (`kernel/fork.c: set_max_threads`). They take
/// some 300 MiB here, and task structures in a hostile guest can overlap.
pub const MAX_TASKS: usize = 1 << 20;

/// Why the tasks cannot be told now.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TasksError {
    /// The lists are being changed: resume the guest for a moment and look again.
    #[error("{0} is held for writing")]
    Busy(&'static str),
    /// Memory that the lists lead to cannot be read.
    #[error("cannot read the list of tasks: {0}")]
    Read(#[from] ReadError),
    /// A symbol is missing.
    #[error("cannot find the list of tasks: {0}")]
    Symbol(#[from] SymbolError),
    /// The stacks of CPUs could not be found, and so not which task is on which.
    #[error(transparent)]
    Places(#[from] StackAreaError),
    /// A task is on the lists twice: a cycle.
    #[error("the list of tasks leads back to {0}")]
    Cycle(Gva),
    /// A process whose list of threads does not lead from its first one past the list's head and back.
    #[error(
        "the list of threads of the process {0} does not lead past its head and back to the first of them"
    )]
    Leaderless(Gva),
    /// More tasks than a kernel can have.
    #[error("more than {MAX_TASKS} tasks")]
    TooMany,
    /// The kernel counts its tasks, and the lists hold another number.
    #[error("the lists hold {found} tasks and the kernel counts {counted}")]
    Miscounted {
        /// Tasks on the lists.
        found: u64,
        /// What `nr_threads` says.
        counted: u64,
    },
}

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

/// The lists change under `tasklist_lock` held for writing; readers do them no harm.
fn check_lock(kernel: &Kernel, memory: &KernelMemory<'_>) -> Result<(), TasksError> {
    let lock = kernel.symbols.address("tasklist_lock")?;
    if kernel.layout.lock.rwlock_writer.is_held(memory, lock)? {
        return Err(TasksError::Busy("tasklist_lock"));
    }
    Ok(())
}

/// How many tasks were ever put on the lists, and how many are on them: while neither changes, nobody came to the lists and nobody left.
///
/// Both are counted in the section under `tasklist_lock` that puts a task there (`kernel/fork.c: copy_process`, `total_forks` and
/// `nr_threads`) or takes it off (`kernel/exit.c: __unhash_process`, `nr_threads`), and the first never falls. Another thread can
/// take the place of its process's first one without being counted (`fs/exec.c: de_thread`), which is on the lists as well then and is
/// taken off, and counted, next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskCounts {
    born: u64,
    living: u32,
}

impl TaskCounts {
    /// As it stands between two changes of the lists; none where the kernel does not count.
    ///
    /// # Errors
    /// [`TasksError::Busy`] when the lists are being changed.
    pub(crate) fn take(
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<Option<TaskCounts>, TasksError> {
        let count = || -> Result<Option<TaskCounts>, TasksError> {
            let [born, living] =
                ["total_forks", "nr_threads"].map(|name| kernel.symbols.address(name).ok());
            let (Some(born), Some(living)) = (born, living) else {
                return Ok(None);
            };
            Ok(Some(TaskCounts {
                born: memory.pointer(born)?.0,
                living: memory.u32(living)?,
            }))
        };
        let before = count()?;
        check_lock(kernel, memory)?;
        // Whoever held the lock in between, in a guest that runs, has counted by now.
        match count()? {
            after if after == before => Ok(after),
            _ => Err(TasksError::Busy("tasklist_lock")),
        }
    }
}

/// `nr_threads` changes with the lists, under the same lock. It does not count the boot CPU's idle task, which heads them.
pub(crate) fn check_count(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    found: usize,
) -> Result<(), TasksError> {
    let Ok(counter) = kernel.symbols.address("nr_threads") else {
        return Ok(());
    };
    let counted = u64::from(memory.u32(counter)?) + 1;
    let found = found as u64;
    if found == counted {
        Ok(())
    } else {
        Err(TasksError::Miscounted { found, counted })
    }
}
