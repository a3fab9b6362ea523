//! Why the task list cannot be read.

use crate::addr::Gva;
use crate::kernel::StackAreaError;
use crate::memory::kernel::ReadError;
use crate::symbols::SymbolError;

/// The most tasks that are read. A kernel with 128 GiB allows itself about this many
/// (`kernel/fork.c: set_max_threads`). They take some 300 MiB here, and the task structures of a
/// hostile guest can overlap.
pub const MAX_TASKS: usize = 1 << 20;

/// Why the task list cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TasksError {
    /// This lock is held for writing, so the lists are being changed. Resume the guest for a moment
    /// and try again.
    #[error("{0} is held for writing")]
    Busy(&'static str),
    /// Memory that the lists lead to cannot be read.
    #[error("cannot read the task list: {0}")]
    Read(#[from] ReadError),
    /// A symbol is missing.
    #[error("cannot find the task list: {0}")]
    Symbol(#[from] SymbolError),
    /// The stacks of the CPUs are not known, and so neither is which task runs on which CPU.
    #[error(transparent)]
    StackAreas(#[from] StackAreaError),
    /// The task at this address is on the lists twice: a list has a cycle.
    #[error("the task list has a cycle: it leads back to the task at {0}")]
    Cycle(Gva),
    /// The thread list of the process whose first thread is at this address does not lead through
    /// the list's head and back to that thread.
    #[error(
        "the thread list of the process whose task_struct is at {0} is corrupt: it does not pass \
         through `signal->thread_head`"
    )]
    Leaderless(Gva),
    /// The lists have more than [`MAX_TASKS`] tasks.
    #[error("the task lists hold more than {MAX_TASKS} tasks")]
    TooMany,
    /// The number of tasks on the lists is not the kernel's own count.
    #[error("the lists hold {found} tasks and the kernel counts {counted}")]
    Miscounted {
        /// Tasks on the lists.
        found: u64,
        /// `nr_threads`, plus the boot CPU's idle task, which it does not count.
        counted: u64,
    },
}
