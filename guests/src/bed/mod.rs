//! The test bed: runs a command where a KVM runs stock kernels.
//!
//! If the host's own KVM does, the command runs directly on the host. Otherwise it runs in a nested
//! machine: QEMU emulates an AMD machine with SVM, in which a stock Debian kernel loads the real
//! kvm_amd. The nested machine has the host's file tree, and the command's input, output and exit
//! status are passed through.
//!
//! In the nested bed the file tree is read-only, except the folders that the caller names as
//! writable. `/tmp` and `/var/tmp` show the host's files; what is written there stays in the bed
//! and is discarded with it. `TMPDIR` is not passed on, unless the command sets it. The bed runs as
//! any user, and in it the command is root, but has of the host's files what that user has. A bed
//! that dies is distinguished from a command that fails:
//! [`BedError::Died`] is never the command's result, and [`counts`] says how often it happened.

mod command_spec;
mod error;
mod files;
mod host_check;
mod machine;
mod native;
mod nested;
mod probe;
mod protocol;
mod stats;
mod terminal;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;

use crate::bed::files::BedFiles;
use crate::bed::machine::MachineSize;
use crate::host::cache::Cache;

pub use error::BedError;
pub use probe::Probe;
pub use stats::{Counts, counts};

/// The number of CPUs of a nested bed, unless the caller sets it.
///
/// With one CPU, guests of 1 to 4 vCPUs ran under load for hours. With two, emulated by two
/// threads, about every fifth guest dies of a triple fault, or the bed of an overwritten kernel
/// stack, once the guest's vCPUs migrate between the CPUs. A host with more cores runs more beds
/// instead.
const DEFAULT_CPUS: u32 = 1;
/// The memory of a nested bed in MiB, unless the caller sets it.
const DEFAULT_MEMORY_MIB: u32 = 4096;

/// How and where to run commands.
#[derive(Debug, Clone)]
pub struct Bed {
    probe: Probe,
    size: MachineSize,
    writable: Vec<PathBuf>,
    limit: Option<Duration>,
    verbose: bool,
}

impl Bed {
    /// A bed for this host: native if the host's KVM runs stock kernels, otherwise nested.
    pub fn new() -> Bed {
        Bed {
            probe: Probe::detect(),
            size: MachineSize {
                cpus: DEFAULT_CPUS,
                memory_mib: DEFAULT_MEMORY_MIB,
            },
            writable: Vec::new(),
            limit: None,
            verbose: false,
        }
    }

    /// Makes the bed nested even if the host's KVM runs stock kernels.
    pub fn nested(mut self) -> Bed {
        self.probe = Probe::Nested {
            reason: "requested".to_owned(),
        };
        self
    }

    /// Sets the number of CPUs of a nested bed.
    pub fn cpus(mut self, cpus: u32) -> Bed {
        self.size.cpus = cpus;
        self
    }

    /// Sets the memory of a nested bed, in MiB.
    pub fn memory_mib(mut self, mib: u32) -> Bed {
        self.size.memory_mib = mib;
        self
    }

    /// Adds a folder of the host, which must exist, that the command may write.
    pub fn writable(mut self, folder: impl AsRef<Path>) -> Bed {
        self.writable.push(folder.as_ref().to_owned());
        self
    }

    /// Sets a time limit for the command.
    pub fn limit(mut self, limit: Duration) -> Bed {
        self.limit = Some(limit);
        self
    }

    /// Whether a nested bed reports on standard error how long it took to start.
    pub fn verbose(mut self, verbose: bool) -> Bed {
        self.verbose = verbose;
        self
    }

    /// Whether the host's KVM runs stock kernels, and why.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Runs a command until it ends, with this process's standard streams. If these are a terminal,
    /// the command has a terminal.
    ///
    /// A nested bed takes the program, arguments, environment and folder from `command`, not its
    /// streams.
    pub fn run(&self, command: &mut Command) -> Result<ExitStatus, BedError> {
        match self.probe {
            Probe::Native { .. } => native::run(command, self.limit),
            Probe::Nested { .. } => nested::run(self, command),
        }
    }

    /// Runs a command until it ends, with `input` as its standard input, and collects its output.
    pub fn output(&self, command: &mut Command, input: &[u8]) -> Result<Output, BedError> {
        match self.probe {
            Probe::Native { .. } => native::run_with_output(command, input, self.limit),
            Probe::Nested { .. } => nested::run_with_output(self, command, input),
        }
    }

    /// Makes sure that a bed can run on this host, before anything is fetched or built.
    ///
    /// # Errors
    /// When it cannot, with what to do about it.
    pub fn check(&self) -> Result<(), BedError> {
        host_check::check(&Cache::open()?)?;
        match self.probe {
            Probe::Native { .. } => Ok(()),
            Probe::Nested { .. } => machine::check_sockets(),
        }
    }

    /// Fetches and builds all files that a bed needs, without starting it.
    pub fn prepare(&self) -> Result<(), BedError> {
        self.check()?;
        if matches!(self.probe, Probe::Nested { .. }) {
            BedFiles::fetch(&Cache::open()?)?;
        }
        Ok(())
    }
}

impl Default for Bed {
    fn default() -> Bed {
        Bed::new()
    }
}
