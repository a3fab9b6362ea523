//! Builds the initramfs that guests boot from: busybox, our own programs, and files that the caller
//! adds.
//!
//! When a guest has booted, it prints the line [`READY`] and runs a root shell on the console.
//! `poweroff -f` and `reboot -f` end it.

pub mod cpio;
pub mod programs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::{At, Cache, CacheError, fingerprint};
use crate::initramfs::cpio::Archive;
use crate::initramfs::programs::{GUEST_PROGRAMS, ProgramError};

/// The line that a guest prints when its shell is ready for input.
pub const READY: &str = "outpatch guest ready";
/// The path in the guest of the script of [`Initramfs::with_script`].
const SCRIPT: &str = "/etc/outpatch-script";
const INIT: &str = include_str!("../../programs/guest-init.sh");

/// Why the initramfs could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// busybox could not be fetched.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// One of our programs could not be built.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file or the cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// busybox did not list its commands.
    #[error("{busybox} --list: {reason}", busybox = .busybox.display())]
    Busybox {
        /// The program's path.
        busybox: PathBuf,
        /// The error, or its exit status.
        reason: String,
    },
}

/// A file that the caller adds.
#[derive(Debug, Clone)]
struct ExtraFile {
    path: String,
    permissions: u32,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    File(PathBuf),
    Bytes(Vec<u8>),
}

/// An initramfs to be built.
#[derive(Debug, Clone, Default)]
pub struct Initramfs {
    extras: Vec<ExtraFile>,
}

impl Initramfs {
    /// An initramfs with busybox and our programs.
    pub fn new() -> Initramfs {
        Initramfs::default()
    }

    /// Adds a file of the host as `path`, executable.
    pub fn with_file(self, path: &str, file: impl AsRef<Path>) -> Initramfs {
        self.with(path, 0o755, Content::File(file.as_ref().to_owned()))
    }

    /// Adds a file with this content as `path`, not executable.
    pub fn with_content(self, path: &str, content: impl Into<Vec<u8>>) -> Initramfs {
        self.with(path, 0o644, Content::Bytes(content.into()))
    }

    /// Adds a shell script that the guest runs before its shell. The guest prints its exit status.
    pub fn with_script(self, script: &str) -> Initramfs {
        self.with_content(SCRIPT, script)
    }

    fn with(mut self, path: &str, permissions: u32, content: Content) -> Initramfs {
        self.extras.push(ExtraFile {
            path: path.to_owned(),
            permissions,
            content,
        });
        self
    }

    /// Builds the initramfs, or finds one with the same content in the cache. Returns its path.
    pub fn build(&self, cache: &Cache) -> Result<PathBuf, InitramfsError> {
        let mut archive = Archive::new();
        archive.device("/dev/console", 5, 1);
        for folder in ["/proc", "/sys", "/tmp", "/run", "/root", "/etc"] {
            archive.folder(folder);
        }
        archive.file("/init", 0o755, INIT.as_bytes());
        add_busybox(cache, &mut archive)?;
        for program in &GUEST_PROGRAMS {
            let binary = programs::build(cache, program)?;
            let content = fs::read(&binary).at(&binary)?;
            archive.file(&format!("/bin/{}", program.name), 0o755, &content);
        }
        for extra in &self.extras {
            let content = match &extra.content {
                Content::File(file) => fs::read(file).at(file)?,
                Content::Bytes(content) => content.clone(),
            };
            archive.file(&extra.path, extra.permissions, &content);
        }
        let bytes = archive.finish();
        let hash = fingerprint([bytes.as_slice()]);
        let path = cache.root().join(format!("initramfs/{hash}.cpio"));
        if !path.is_file() {
            cache.write(&path, &bytes)?;
        }
        Ok(path)
    }
}

fn add_busybox(cache: &Cache, archive: &mut Archive) -> Result<(), InitramfsError> {
    let package = Packages::new(cache).fetch("busybox-static", &["bookworm"])?;
    let busybox = package.root.join("bin/busybox");
    let content = fs::read(&busybox).at(&busybox)?;
    archive.file("/bin/busybox", 0o755, &content);
    let failed = |reason: String| InitramfsError::Busybox {
        busybox: busybox.clone(),
        reason,
    };
    let list = Command::new(&busybox)
        .arg("--list")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !list.status.success() {
        return Err(failed(list.status.to_string()));
    }
    // The guest need not spend time on creating these links.
    for applet in String::from_utf8_lossy(&list.stdout).split_whitespace() {
        if applet != "busybox" {
            archive.link(&format!("/bin/{applet}"), "busybox");
        }
    }
    Ok(())
}
