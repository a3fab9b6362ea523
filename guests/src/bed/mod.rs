//! The test bed: runs a command where a KVM serves stock kernels.
//!
//! That is right here when the host's KVM serves. Otherwise it is a nested machine: QEMU emulates an AMD machine with
//! SVM, a stock Debian kernel in it loads the real kvm_amd, the host's file tree is its own, and the command runs there
//! with its input, output and exit status carried over.
//!
//! In the nested bed the tree is read-only, except the folders that the caller names as writable. `/tmp` and `/var/tmp`
//! show the host's, and what is written there is the bed's own and goes with it. A bed that dies is told from a command that
//! fails: [`BedError::Died`] is never the command's result, and [`counts`] says how often it happened.

mod machine;
mod parts;
mod probe;
mod run;
mod terminal;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::debian::error::PackageError;
use crate::host::cache::{Cache, CacheError};
use crate::initramfs::programs::ProgramError;
use crate::kernel::KernelError;
use crate::kernel::modules::ModuleError;

pub use probe::Probe;

/// Set in the environment of what runs in a nested bed.
pub const INSIDE: &str = "OUTPATCH_BED";

/// How many CPUs a nested bed has. With one, guests of 1 to 4 vCPUs ran under load for hours; with two, emulated by two threads,
/// every fifth guest or so dies of a triple fault, or the bed of an overwritten kernel stack, once a guest's vCPUs move between
/// them. A machine with more cores runs more beds.
const CPUS: u32 = 1;

static STARTED: AtomicU64 = AtomicU64::new(0);
static LOST: AtomicU64 = AtomicU64::new(0);

/// Why the bed gave no status of the command.
#[derive(Debug, thiserror::Error)]
pub enum BedError {
    /// A package could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The bed's kernel could not be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A module of the bed's kernel could not be had.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The bed's first process could not be built.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The bed could not be set up.
    #[error("the bed could not be set up: {0}")]
    Setup(String),
    /// The bed died under the command: this says nothing about the command.
    #[error(
        "the bed died ({reason}); this is not the command's result\n--- the last words of the bed's console ---\n{console}"
    )]
    Died {
        /// What was seen.
        reason: String,
        /// The end of its console.
        console: String,
    },
    /// The command took longer than the caller allows.
    #[error("the command did not end within {0:?}; the bed was stopped")]
    TimedOut(Duration),
    /// The command or its streams could not be handled.
    #[error("{0}")]
    Command(String),
}

/// How many nested beds this process started, and how many of them died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Beds started.
    pub started: u64,
    /// Beds that died by themselves.
    pub lost: u64,
}

/// The beds of this process so far.
pub fn counts() -> Counts {
    Counts {
        started: STARTED.load(Ordering::Relaxed),
        lost: LOST.load(Ordering::Relaxed),
    }
}

#[derive(Debug, Clone, Copy)]
struct Size {
    cpus: u32,
    memory_mib: u32,
}

/// A place to run commands.
#[derive(Debug, Clone)]
pub struct Bed {
    probe: Probe,
    size: Size,
    writable: Vec<PathBuf>,
    limit: Option<Duration>,
    verbose: bool,
}

impl Bed {
    /// The bed for this machine: right here, or nested.
    pub fn new() -> Bed {
        Bed {
            probe: Probe::look(),
            size: Size {
                cpus: CPUS,
                memory_mib: 4096,
            },
            writable: Vec::new(),
            limit: None,
            verbose: false,
        }
    }

    /// A nested bed even where the host's KVM serves.
    pub fn nested(mut self) -> Bed {
        self.probe = Probe::Nested {
            reason: "asked for".to_owned(),
        };
        self
    }

    /// How many CPUs a nested bed has.
    pub fn cpus(mut self, cpus: u32) -> Bed {
        self.size.cpus = cpus;
        self
    }

    /// How much memory a nested bed has, in MiB.
    pub fn memory_mib(mut self, mib: u32) -> Bed {
        self.size.memory_mib = mib;
        self
    }

    /// A folder of the host that the command may write, for real. It must exist.
    pub fn writable(mut self, folder: impl AsRef<Path>) -> Bed {
        self.writable.push(folder.as_ref().to_owned());
        self
    }

    /// How long the command may take.
    pub fn limit(mut self, limit: Duration) -> Bed {
        self.limit = Some(limit);
        self
    }

    /// Says on standard error how long the bed took to start.
    pub fn verbose(mut self, verbose: bool) -> Bed {
        self.verbose = verbose;
        self
    }

    /// What was found about the host's KVM.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Runs a command to its end, with our own input and output; on a terminal, the command has a terminal.
    ///
    /// Of `command` its program, arguments, environment and folder are used; its streams are ours.
    pub fn run(&self, command: &mut Command) -> Result<ExitStatus, BedError> {
        match self.probe {
            Probe::Native { .. } => run::here(command, self.limit),
            Probe::Nested { .. } => run::nested_with_our_streams(self, command),
        }
    }

    /// Runs a command to its end with `input`, and collects what it writes.
    pub fn output(&self, command: &mut Command, input: &[u8]) -> Result<Output, BedError> {
        match self.probe {
            Probe::Native { .. } => run::output_here(command, input, self.limit),
            Probe::Nested { .. } => run::nested_output(self, command, input),
        }
    }

    /// Fetches and builds all that a bed is made of, without starting one.
    pub fn prepare(&self) -> Result<(), BedError> {
        if matches!(self.probe, Probe::Nested { .. }) {
            parts::Parts::gather(&Cache::open()?)?;
        }
        Ok(())
    }
}

impl Default for Bed {
    fn default() -> Bed {
        Bed::new()
    }
}
