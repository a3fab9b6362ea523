//! crash, the kernel's own debugger of core files: Debian's package, run from the cache.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::Cache;
use crate::host::tools;

/// The suite whose crash this machine can run.
const SUITE: &str = "bookworm";

/// crash in the cache.
#[derive(Debug, Clone)]
pub struct Crash {
    program: PathBuf,
    libraries: OsString,
}

impl Crash {
    /// Fetches crash and the libraries that this machine lacks, or finds them in the cache.
    ///
    /// # Errors
    /// When a package cannot be had.
    pub fn fetch(cache: &Cache) -> Result<Crash, PackageError> {
        let packages = Packages::new(cache);
        let crash = packages.fetch("crash", &[SUITE])?;
        let libraries = packages.fetch_libraries(&[&crash], SUITE)?;
        Ok(Crash {
            program: crash.root.join("usr/bin/crash"),
            libraries,
        })
    }

    /// crash, quiet and without a terminal.
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
