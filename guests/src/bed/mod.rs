//! The test bed: runs a command where a KVM serves stock kernels.
//!
//! That is right here when the host's KVM serves. Otherwise it is a nested machine: QEMU emulates an AMD machine with
//! SVM, a stock Debian kernel in it loads the real kvm_amd, the host's file tree is its own, and the command runs there
//! with its input, output and exit status carried over.
//!
//! In the nested bed the tree is read-only, except the folders that the caller names as writable. `/tmp` and `/var/tmp`
//! show the host's, and what is written there is the bed's own and goes with it. A bed that dies is told from a command that
//! fails: [`BedError::Died`] is never the command's result, and [`counts`] says how often it happened.

mod command_spec;
mod error;
mod files;
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

/// How many CPUs a nested bed has. With one, guests of 1 to 4 vCPUs ran under load for hours; with two, emulated by two threads,
/// every fifth guest or so dies of a triple fault, or the bed of an overwritten kernel stack, once a guest's vCPUs move between
/// them. A machine with more cores runs more beds.
const CPUS: u32 = 1;

/// A place to run commands.
#[derive(Debug, Clone)]
pub struct Bed {
    probe: Probe,
    size: MachineSize,
    writable: Vec<PathBuf>,
    limit: Option<Duration>,
    verbose: bool,
}

impl Bed {
    /// The bed for this machine: right here, or nested.
    pub fn new() -> Bed {
        Bed {
            probe: Probe::detect(),
            size: MachineSize {
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
            Probe::Native { .. } => native::run(command, self.limit),
            Probe::Nested { .. } => nested::run(self, command),
        }
    }

    /// Runs a command to its end with `input`, and collects what it writes.
    pub fn output(&self, command: &mut Command, input: &[u8]) -> Result<Output, BedError> {
        match self.probe {
            Probe::Native { .. } => native::run_with_output(command, input, self.limit),
            Probe::Nested { .. } => nested::run_with_output(self, command, input),
        }
    }

    /// Fetches and builds all that a bed is made of, without starting one.
    pub fn prepare(&self) -> Result<(), BedError> {
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
