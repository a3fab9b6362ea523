//! QEMU from its packages: the program, its firmware, its libraries.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::Cache;

/// Older QEMUs lose a boot in ten under multi-threaded emulation; newer ones need a newer C library.
const SUITES: &[&str] = &["bookworm-backports"];
/// Where the libraries come from that the machine lacks.
pub(crate) const LIBRARY_SUITE: &str = "bookworm";
/// `setpriv` asks the kernel to kill the program when we die; std has no safe way to ask for it.
pub(crate) const DEATH_SIGNAL: [&str; 3] = ["--pdeathsig", "KILL", "--"];

/// The files that make QEMU run.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    firmware: Vec<PathBuf>,
    libraries: OsString,
}

impl Qemu {
    /// Fetches what the cache does not have.
    ///
    /// # Errors
    /// When a package cannot be had.
    pub fn fetch(cache: &Cache) -> Result<Qemu, PackageError> {
        let packages = Packages::new(cache);
        let qemu = packages.fetch("qemu-system-x86", SUITES)?;
        let data = packages.fetch("qemu-system-data", SUITES)?;
        let bios = packages.fetch("seabios", &["bookworm"])?;
        Ok(Qemu {
            program: qemu.root.join("usr/bin/qemu-system-x86_64"),
            firmware: vec![
                data.root.join("usr/share/qemu"),
                bios.root.join("usr/share/seabios"),
            ],
            libraries: packages.fetch_libraries(&[&qemu], LIBRARY_SUITE)?,
        })
    }

    /// A machine with nothing in it but what the caller adds, that ends when the thread that starts it does.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = with_death_signal(&self.program, &self.libraries);
        for folder in &self.firmware {
            command.arg("-L").arg(folder);
        }
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command
    }
}

/// `program`, killed when the thread that starts it ends.
pub(crate) fn with_death_signal(program: &Path, libraries: &OsStr) -> Command {
    let mut command = Command::new("setpriv");
    command.args(DEATH_SIGNAL).arg(program);
    with_libraries(command, libraries)
}

pub(crate) fn with_libraries(mut command: Command, libraries: &OsStr) -> Command {
    let path = crate::host::tools::library_path(libraries);
    if !path.is_empty() {
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}
