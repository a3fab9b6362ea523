//! The files that a nested bed is started from, all in the cache: a QEMU that emulates SVM well, a
//! server for the host's file tree, a kernel with the real kvm_amd module, and an initramfs with
//! our init program. This module must not know how they are run.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::bed::error::BedError;
use crate::debian::packages::Packages;
use crate::external::qemu::{LIBRARY_SUITE, Qemu};
use crate::host::cache::{At, Cache, fingerprint};
use crate::initramfs::cpio::Archive;
use crate::initramfs::programs;
use crate::kernel::modules;
use crate::kernel::{Flavour, Generation, Kernel};

/// The suites that have QEMU's virtiofs server: later ones no longer do.
const SERVER_SUITES: &[&str] = &["bookworm", "bookworm-security"];
/// The modules that init loads: the file system of the scratch folders, and KVM.
const MODULES: &[&str] = &["overlay", "kvm_amd"];

/// The files that a nested bed is started from.
#[derive(Debug, Clone)]
pub(super) struct BedFiles {
    pub(super) qemu: Qemu,
    /// The virtiofs server.
    pub(super) server: PathBuf,
    /// The name of the library that is preloaded into it, in one of its libraries' folders: a path
    /// with a space in it would be two.
    pub(super) server_preload: OsString,
    pub(super) server_libraries: OsString,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

impl BedFiles {
    /// Fetches and builds the files, or finds them in the cache.
    pub(super) fn fetch(cache: &Cache) -> Result<BedFiles, BedError> {
        let packages = Packages::new(cache);
        let server = packages.fetch("qemu-system-common", SERVER_SUITES)?;
        let kernel = Kernel::fetch(cache, Generation::V6_12, Flavour::Cloud)?;
        let initramfs = initramfs(cache, &kernel)?;
        let preload = programs::build_library(cache, &programs::BED_SERVER)?;
        let mut libraries = packages.fetch_libraries(&[&server], LIBRARY_SUITE)?;
        if !libraries.is_empty() {
            libraries.push(":");
        }
        libraries.push(preload.parent().unwrap_or(cache.root()));
        Ok(BedFiles {
            qemu: Qemu::fetch(cache)?,
            server: server.root.join("usr/lib/qemu/virtiofsd"),
            server_preload: preload.file_name().unwrap_or_default().to_owned(),
            server_libraries: libraries,
            kernel: kernel.bzimage,
            initramfs,
        })
    }
}

fn initramfs(cache: &Cache, kernel: &Kernel) -> Result<PathBuf, BedError> {
    let init = programs::build(cache, &programs::BED_INIT)?;
    let hash = fingerprint([
        programs::BED_INIT.text.as_bytes(),
        kernel.release.as_bytes(),
        kernel.version.as_bytes(),
    ]);
    let path = cache.root().join(format!("bed/initramfs-{hash}"));
    if path.is_file() {
        return Ok(path);
    }
    let mut archive = Archive::new();
    archive.device("/dev/console", 5, 1);
    archive.file("/init", 0o755, &read(&init)?);
    let mut order = String::new();
    for module in modules::with_dependencies(&kernel.modules, MODULES)? {
        archive.file(&format!("/modules/{}", module.file), 0o644, &module.content);
        order.push_str(&module.file);
        order.push('\n');
    }
    archive.file("/modules/order", 0o644, order.as_bytes());
    cache.write(&path, &archive.finish())?;
    Ok(path)
}

fn read(path: &Path) -> Result<Vec<u8>, BedError> {
    Ok(fs::read(path).at(path)?)
}
