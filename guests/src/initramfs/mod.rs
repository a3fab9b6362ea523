//! The initramfs that guests boot from: busybox, our own programs, and whatever the caller adds.
//!
//! A guest's boot ends with the line [`READY`] and a root shell on the console. `poweroff -f` and `reboot -f` end it.

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

/// The line on the console after which the guest's shell takes input.
pub const READY: &str = "outpatch guest ready";
/// What the shell prints when it waits for a command.
pub const PROMPT: &str = "guest# ";
/// Where a guest finds the script that [`Initramfs::with_script`] gave it.
const SCRIPT: &str = "/etc/outpatch-script";
const INIT: &str = include_str!("../../programs/guest-init.sh");

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// busybox could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// One of our programs could not be built.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file could not be read, or the cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// busybox did not say what it can do.
    #[error("{busybox} --list: {reason}", busybox = .busybox.display())]
    Busybox {
        /// The program.
        busybox: PathBuf,
        /// What happened.
        reason: String,
    },
}

/// A file for the guest.
#[derive(Debug, Clone)]
struct Extra {
    place: String,
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
    extras: Vec<Extra>,
}

impl Initramfs {
    /// busybox and our programs.
    pub fn new() -> Initramfs {
        Initramfs::default()
    }

    /// Adds a file of the host. It can be run in the guest.
    pub fn with_file(self, place: &str, file: impl AsRef<Path>) -> Initramfs {
        self.with(place, 0o755, Content::File(file.as_ref().to_owned()))
    }

    /// Adds a file with this content.
    pub fn with_content(self, place: &str, content: impl Into<Vec<u8>>) -> Initramfs {
        self.with(place, 0o644, Content::Bytes(content.into()))
    }

    /// A shell script that the guest runs before its shell; its status is printed.
    pub fn with_script(self, script: &str) -> Initramfs {
        self.with_content(SCRIPT, script)
    }

    fn with(mut self, place: &str, permissions: u32, content: Content) -> Initramfs {
        self.extras.push(Extra {
            place: place.to_owned(),
            permissions,
            content,
        });
        self
    }

    /// Builds it, or finds it built from the same files.
    pub fn build(&self, cache: &Cache) -> Result<PathBuf, InitramfsError> {
        let mut archive = Archive::new();
        archive.device("/dev/console", 5, 1);
        for folder in ["/proc", "/sys", "/tmp", "/run", "/root", "/etc"] {
            archive.folder(folder);
        }
        archive.file("/init", 0o755, INIT.as_bytes());
        add_busybox(cache, &mut archive)?;
        for source in &GUEST_PROGRAMS {
            let program = programs::build(cache, source)?;
            let content = fs::read(&program).at(&program)?;
            archive.file(&format!("/bin/{}", source.name), 0o755, &content);
        }
        for extra in &self.extras {
            let content = match &extra.content {
                Content::File(file) => fs::read(file).at(file)?,
                Content::Bytes(content) => content.clone(),
            };
            archive.file(&extra.place, extra.permissions, &content);
        }
        let bytes = archive.finish();
        let mark = fingerprint([bytes.as_slice()]);
        let place = cache.root().join(format!("initramfs/{mark}.cpio"));
        if !place.is_file() {
            cache.write(&place, &bytes)?;
        }
        Ok(place)
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
    // Links made here save the guest the time to make them.
    for applet in String::from_utf8_lossy(&list.stdout).split_whitespace() {
        if applet != "busybox" {
            archive.link(&format!("/bin/{applet}"), "busybox");
        }
    }
    Ok(())
}
