//! Programs of the host: finds them, installs them when run as root, or says how to install them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::error::ToolError;
use crate::host::progress;

/// The folders of the programs that the host's packages install.
///
/// The caller's `PATH` is not searched: it can have programs that the host's owner wrote or built,
/// for example another compiler or a wrapper of `make`, which say nothing about Debian's.
const SYSTEM_FOLDERS: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];
/// The only variables of our environment that a download needs, in lower and upper case.
const PROXIES: [&str; 5] = [
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "all_proxy",
    "no_proxy",
];

/// What a static program in C is compiled with, each with its Debian package.
pub(crate) const COMPILER: [(&str, &str); 2] = [
    ("gcc", "gcc"),
    ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev"),
];

/// The path of a program that a package of the host installed.
pub fn find(name: &str) -> Option<PathBuf> {
    // Joining an absolute path to a folder gives that path.
    SYSTEM_FOLDERS
        .iter()
        .map(|d| Path::new(d).join(name))
        .find(|p| p.is_file())
}

/// Whether the caller's `PATH` has a program.
pub(crate) fn is_in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| d.join(name).is_file())
}

/// A command for a program of the host's packages, with our environment except `PATH`.
pub(crate) fn system(name: &str) -> Command {
    let mut command = Command::new(find(name).unwrap_or_else(|| name.into()));
    command.env("PATH", system_path(None));
    command
}

/// A command that depends on nothing in our environment but the addresses of proxies.
pub(crate) fn downloader(name: &str) -> Command {
    let mut command = system(name);
    command.env_clear().env("PATH", system_path(None));
    command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    for name in PROXIES {
        for name in [name.to_owned(), name.to_uppercase()] {
            if let Some(value) = std::env::var_os(&name) {
                command.env(name, value);
            }
        }
    }
    command
}

/// A command that builds something and depends on nothing in our environment: not on variables, the
/// umask, the home folder or the folder for temporary files, which is `scratch`. Its programs are
/// those of `first`, if that is given, and of the host's packages.
pub(crate) fn builder(program: &str, scratch: &Path, first: Option<&Path>) -> Command {
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "umask 022; exec \"$@\"", "sh", program])
        .env_clear()
        .env("PATH", system_path(first))
        .env("HOME", scratch)
        .env("TMPDIR", scratch)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
    command
}

/// A value for `PATH`: `first`, if there is one, and then the folders of the host's packages.
fn system_path(first: Option<&Path>) -> OsString {
    let mut path = OsString::new();
    if let Some(folder) = first {
        path.push(folder);
        path.push(":");
    }
    path.push(SYSTEM_FOLDERS.join(":"));
    path
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
        downloader("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
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

/// `text` as one word of a shell script.
pub(crate) fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The command line as one would type it, for messages.
pub(crate) fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_gets_nothing_of_our_environment() {
        let folder = Path::new("/a folder");
        let output = builder("env", folder, Some(Path::new("/first"))).output();
        let output = String::from_utf8(output.unwrap().stdout).unwrap();
        let mut names: Vec<&str> = output.lines().filter_map(|l| l.split('=').next()).collect();
        names.sort_unstable();
        // The shell sets `_` or `PWD`, or both.
        names.retain(|name| !["PWD", "_", "OLDPWD", "SHLVL"].contains(name));
        assert_eq!(names, ["HOME", "LC_ALL", "PATH", "TMPDIR"]);
        assert!(output.contains("PATH=/first:/usr/bin:"), "{output}");
        let output = builder("sh", folder, None).args(["-c", "umask"]).output();
        assert_eq!(output.unwrap().stdout, b"0022\n");
    }

    #[test]
    fn a_word_of_a_shell_script_stays_one_word() {
        let output = builder("sh", Path::new("/"), None)
            .arg("-c")
            .arg(format!("printf %s {}", shell_word("it's $HOME *")))
            .output();
        assert_eq!(output.unwrap().stdout, b"it's $HOME *");
    }
}
