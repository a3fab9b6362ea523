//! Why a command failed, and the exit status that says so.

use std::io;
use std::path::PathBuf;

use introspect::CoreError;
use patcher::PatchError;
use vmm::client::ClientError;

/// Exit status when the VMM refused, or a file cannot be used. (2 is for wrong arguments.)
const FAILED: u8 = 1;
/// Exit status when no VMM answers on the socket.
const UNREACHABLE: u8 = 3;
/// Exit status when a transition still runs at the end of `--timeout`.
const TIMED_OUT: u8 = 4;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The VMM refused, or did not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A module's file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The module's file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The core file cannot be used.
    #[error("{}: {source}", path.display())]
    Core {
        /// The core file.
        path: PathBuf,
        /// What is wrong with it.
        source: CoreError,
    },
    /// The guest in the core file cannot be read.
    #[error("{}: {source}", path.display())]
    InCore {
        /// The core file.
        path: PathBuf,
        /// What the patcher says of the guest.
        source: PatchError,
    },
    /// The guest was paused while it changed what is to be read: trying again shows the same.
    #[error(
        "{}: the guest was paused in the middle of a change ({what}): make another core file of it",
        path.display()
    )]
    CaughtInCore {
        /// The core file.
        path: PathBuf,
        /// What the guest was doing.
        what: String,
    },
    /// The module cannot be applied to the guest in the core file.
    #[error("{} in {}: {source}", file.display(), core.display())]
    NotForCore {
        /// The module's file.
        file: PathBuf,
        /// The core file.
        core: PathBuf,
        /// Why the module cannot be applied.
        source: PatchError,
    },
    /// The VMM refused the module.
    #[error("{}: {source}", path.display())]
    Module {
        /// The module's file.
        path: PathBuf,
        /// The VMM's error.
        source: ClientError,
    },
    /// Standard output cannot be written, or there is no event queue.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The command does not fit the state of the guest's patches, or the arguments.
    #[error("{0}")]
    InvalidState(String),
    /// The transition still runs after the time that the caller wanted to wait.
    #[error("{0}")]
    TimedOut(String),
}

impl CommandError {
    /// The exit status of a command that fails with this error.
    pub fn exit_status(&self) -> u8 {
        match self {
            CommandError::Client(error) | CommandError::Module { source: error, .. }
                if error.is_unreachable() =>
            {
                UNREACHABLE
            }
            CommandError::TimedOut(_) => TIMED_OUT,
            _ => FAILED,
        }
    }
}
