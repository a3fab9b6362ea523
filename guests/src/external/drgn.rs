//! drgn, the debugger that outpatch's answers are compared with: fetched from PyPI with the host's
//! pip, kept in the cache and not installed.
//!
//! This module knows how to run a script with drgn; it must not know what the script does.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::apt::run;
use crate::debian::error::PackageError;
use crate::host::cache::Cache;
use crate::host::{progress, tools};

/// The version that the figures in `docs/` were measured with.
const VERSION: &str = "0.3.0";

/// drgn in the cache.
#[derive(Debug, Clone)]
pub struct Drgn {
    packages: PathBuf,
}

impl Drgn {
    /// Fetches drgn, or finds it in the cache.
    ///
    /// # Errors
    /// When Python or pip is missing and cannot be installed, or the download fails.
    pub fn fetch(cache: &Cache) -> Result<Drgn, PackageError> {
        if !["python3", "pip3"].into_iter().all(tools::is_in_path) {
            tools::require(&[("python3", "python3"), ("pip3", "python3-pip")])?;
        }
        let packages = cache
            .root()
            .join(format!("drgn/{VERSION}-{}", python_tag()?));
        if !packages.is_dir() {
            let staging = cache.stage()?;
            let bar = progress::spinner(&format!("fetching drgn {VERSION}"));
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps"])
                .args(["--only-binary", ":all:", "--target"])
                .arg(staging.path())
                .arg(format!("drgn=={VERSION}"));
            run(pip, || bar.tick())?;
            bar.finish_and_clear();
            staging.commit(&packages)?;
        }
        Ok(Drgn { packages })
    }

    /// The command that runs a Python script that imports drgn.
    pub fn command(&self, script: &Path) -> Command {
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &self.packages).arg(script);
        command
    }
}

/// Python's name for its version in the names of compiled files, for example `cpython-311`: drgn is
/// built for one of them.
fn python_tag() -> Result<String, PackageError> {
    let mut command = Command::new("python3");
    command.args(["-c", "import sys; print(sys.implementation.cache_tag)"]);
    let output = run(command, || ())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
