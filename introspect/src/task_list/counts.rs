//! The kernel's own counts of its tasks, and the lock under which they and the lists change.
//!
//! This module knows `tasklist_lock`, `total_forks` and `nr_threads`; it must not know the lists
//! themselves.

use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task_list::error::TasksError;

/// Fails while `tasklist_lock` is held for writing: only then do the lists change. Readers of the
/// lock do no harm.
fn check_lock(kernel: &Kernel, memory: &KernelMemory<'_>) -> Result<(), TasksError> {
    let lock = kernel.symbols.address("tasklist_lock")?;
    if kernel.layout.lock.rwlock_writer.is_held(memory, lock)? {
        return Err(TasksError::Busy("tasklist_lock"));
    }
    Ok(())
}

/// How many tasks were ever put on the lists, and how many are on them. While neither number
/// changes, no task has joined the lists and none has left.
///
/// Both are counted in the section under `tasklist_lock` that puts a task there (`kernel/fork.c:
/// copy_process`, `total_forks` and `nr_threads`) or takes it off (`kernel/exit.c:
/// __unhash_process`, `nr_threads`), and the first never falls. Another thread can take the place
/// of its process's first one without being counted (`fs/exec.c: de_thread`). The old first thread
/// is then still on the lists, and is taken off, and counted, next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskCounts {
    total_forks: u64,
    nr_threads: u32,
}

impl TaskCounts {
    /// The counts between two changes of the lists; `None` where the kernel has no such variables.
    ///
    /// # Errors
    /// [`TasksError::Busy`] when the lists are being changed.
    pub(crate) fn read(
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<Option<TaskCounts>, TasksError> {
        let read = || -> Result<Option<TaskCounts>, TasksError> {
            let [total_forks, nr_threads] =
                ["total_forks", "nr_threads"].map(|name| kernel.symbols.address(name).ok());
            let (Some(total_forks), Some(nr_threads)) = (total_forks, nr_threads) else {
                return Ok(None);
            };
            Ok(Some(TaskCounts {
                total_forks: memory.pointer(total_forks)?.0,
                nr_threads: memory.u32(nr_threads)?,
            }))
        };
        let before = read()?;
        check_lock(kernel, memory)?;
        // In a guest that runs, any lock holder in between has counted by now.
        match read()? {
            after if after == before => Ok(after),
            _ => Err(TasksError::Busy("tasklist_lock")),
        }
    }
}

/// Compares `found`, the number of tasks on the lists, with `nr_threads`, which changes with the
/// lists under the same lock. `nr_threads` leaves out the boot CPU's idle task, which heads the
/// list of processes.
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
