//! Why the task list cannot be read.

use crate::addr::Gva;
use crate::kernel::stack_areas::StackAreaError;
use crate::memory::kernel::ReadError;
use crate::symbols::SymbolError;

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
