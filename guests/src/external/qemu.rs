//! QEMU from Debian's packages: the program, its firmware and its libraries.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::Cache;
use crate::host::tools;

/// With an older QEMU, one boot in ten fails under multi-threaded emulation; a newer QEMU needs a
/// newer C library.
const SUITES: &[&str] = &["bookworm-backports"];
/// The suite of the libraries that the host lacks.
pub(crate) const LIBRARY_SUITE: &str = "bookworm";
/// `setpriv` has the kernel kill the program when the thread that started it ends (`prctl(2)`,
/// `PR_SET_PDEATHSIG`). The standard library has no safe way to request that.
pub(crate) const DEATH_SIGNAL: [&str; 3] = ["--pdeathsig", "KILL", "--"];

/// QEMU in the cache.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    firmware: Vec<PathBuf>,
    libraries: OsString,
}

impl Qemu {
    /// Fetches QEMU, or finds it in the cache.
    ///
    /// # Errors
    /// When a package cannot be fetched.
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

    /// The command for a machine with no devices but those that the caller adds. QEMU is killed
    /// when the thread that starts it ends.
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

/// The command for `program`, which is killed when the thread that starts it ends.
pub(crate) fn with_death_signal(program: &Path, libraries: &OsStr) -> Command {
    let mut command = tools::system("setpriv");
    command.args(DEATH_SIGNAL).arg(program);
    with_libraries(command, libraries)
}

/// Adds `libraries` to the command's library path.
pub(crate) fn with_libraries(mut command: Command, libraries: &OsStr) -> Command {
    let path = tools::library_path(libraries);
    if !path.is_empty() {
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}
