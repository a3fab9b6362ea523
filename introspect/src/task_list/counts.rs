//! The kernel's own counts of its tasks, and the lock that guards the task list.

use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task_list::error::TasksError;

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
