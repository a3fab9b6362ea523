//! crash, a debugger for kernel core files: Debian's package, run from the cache.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::Cache;
use crate::host::tools;

/// The Debian suite whose package this host can run.
const SUITE: &str = "bookworm";

/// crash in the cache.
#[derive(Debug, Clone)]
pub struct Crash {
    program: PathBuf,
    libraries: OsString,
}

impl Crash {
    /// Fetches crash and the libraries that this host lacks, or finds them in the cache.
    ///
    /// # Errors
    /// When a package cannot be fetched.
    pub fn fetch(cache: &Cache) -> Result<Crash, PackageError> {
        let packages = Packages::new(cache);
        let crash = packages.fetch("crash", &[SUITE])?;
        let libraries = packages.fetch_libraries(&[&crash], SUITE)?;
        Ok(Crash {
            program: crash.root.join("usr/bin/crash"),
            libraries,
        })
    }

    /// The command that starts crash, silently and with no standard input.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("-s")
            .env("LD_LIBRARY_PATH", tools::library_path(&self.libraries))
            .env("HOME", "/nonexistent")
            .stdin(Stdio::null());
        command
    }
}
