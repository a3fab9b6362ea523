//! Programs of the host: finds them, installs them when run as root, or says how to install them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::error::ToolError;
use crate::host::progress;

/// The path of a program of the host, searched in `PATH` and in the folders for administration.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    // Joining an absolute path to a folder gives that path.
    std::env::split_paths(&path)
        .chain(sbin)
        .map(|d| d.join(name))
        .find(|p| p.is_file())
}

/// Makes sure that programs, or files given by their absolute path, are there.
///
/// Each is given with the Debian package that contains it. Missing ones are installed when this
/// process runs as root; otherwise the error names the command that installs them.
pub fn require(wanted: &[(&str, &str)]) -> Result<(), ToolError> {
    let missing: Vec<_> = wanted.iter().filter(|(p, _)| find(p).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    let error = ToolError {
        missing: missing
            .iter()
            .map(|(p, _)| *p)
            .collect::<Vec<_>>()
            .join(", "),
        packages: packages.join(" "),
    };
    if !rustix::process::geteuid().is_root() || find("apt-get").is_none() {
        return Err(error);
    }
    let bar = progress::spinner(&format!("installing {}", packages.join(" ")));
    let apt = |arguments: &[&str]| {
        Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()
    };
    let _ = apt(&["update", "-q"]);
    let mut install = vec!["install", "-y", "-q", "--no-install-recommends"];
    install.extend(&packages);
    let _ = apt(&install);
    bar.finish_and_clear();
    if missing.iter().all(|(p, _)| find(p).is_some()) {
        Ok(())
    } else {
        Err(error)
    }
}

/// A value for `PATH`: `folder`, if there is one, and then the folders of our own `PATH`.
pub(crate) fn path_with(folder: Option<&Path>) -> OsString {
    let mut path = OsString::new();
    if let Some(folder) = folder {
        path.push(folder);
        path.push(":");
    }
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

/// A value for `LD_LIBRARY_PATH`: `folders`, and then those of our own environment.
pub(crate) fn library_path(folders: &OsStr) -> OsString {
    let mut path = folders.to_owned();
    if let Some(own) = std::env::var_os("LD_LIBRARY_PATH").filter(|v| !v.is_empty()) {
        // An empty element would mean the current folder.
        if !path.is_empty() {
            path.push(":");
        }
        path.push(own);
    }
    path
}

/// The command line as one would type it, for messages.
pub(crate) fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
