//! Why the bed could not run a command.

use std::time::Duration;

use crate::debian::error::PackageError;
use crate::host::cache::CacheError;
use crate::host::error::ToolError;
use crate::initramfs::programs::ProgramError;
use crate::kernel::KernelError;
use crate::kernel::modules::ModuleError;

/// Why the bed has no exit status of the command.
#[derive(Debug, thiserror::Error)]
pub enum BedError {
    /// A program is missing on this host.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A Debian package could not be fetched.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The bed's kernel could not be fetched.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A module of the bed's kernel is missing or unreadable.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The bed's init program could not be built.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The bed could not be set up: the command was not started.
    #[error("the bed could not be set up: {0}")]
    Setup(String),
    /// The bed died while the command ran. This says nothing about the command.
    #[error(
        "the bed died ({reason}); this is not the command's result\n\
         --- the end of the bed's console ---\n{console}"
    )]
    Died {
        /// How the bed's death was noticed.
        reason: String,
        /// The last lines of the bed's console.
        console: String,
    },
    /// The command took longer than the caller allows.
    #[error("the command did not end within {0:?}; the bed was stopped")]
    TimedOut(Duration),
    /// The command could not be started, or its streams could not be read or written.
    #[error("{0}")]
    Command(String),
}
