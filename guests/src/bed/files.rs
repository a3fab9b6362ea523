//! What the bed is made of: a QEMU that emulates AMD's virtualisation well, a server for the host's file tree, a kernel
//! with the real kvm_amd module, and an initramfs with our first process. All from packages, in the cache.

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

/// QEMU's server for virtiofs left its packages after this suite.
const SERVER_SUITES: &[&str] = &["bookworm", "bookworm-security"];
/// What the first process loads: the file system for scratch folders, and KVM.
const MODULES: &[&str] = &["overlay", "kvm_amd"];

/// The files that a bed is started from.
#[derive(Debug, Clone)]
pub(super) struct BedFiles {
    pub(super) qemu: Qemu,
    pub(super) server: PathBuf,
    pub(super) server_libraries: OsString,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

impl BedFiles {
    /// Fetches what the cache does not have.
    pub(super) fn fetch(cache: &Cache) -> Result<BedFiles, BedError> {
        let packages = Packages::new(cache);
        let server = packages.fetch("qemu-system-common", SERVER_SUITES)?;
        let kernel = Kernel::fetch(cache, Generation::V6_12, Flavour::Cloud)?;
        let initramfs = initramfs(cache, &kernel)?;
        Ok(BedFiles {
            qemu: Qemu::fetch(cache)?,
            server: server.root.join("usr/lib/qemu/virtiofsd"),
            server_libraries: packages.fetch_libraries(&[&server], LIBRARY_SUITE)?,
            kernel: kernel.bzimage,
            initramfs,
        })
    }
}

fn initramfs(cache: &Cache, kernel: &Kernel) -> Result<PathBuf, BedError> {
    let init = programs::build(cache, &programs::BED_INIT)?;
    let mark = fingerprint([
        programs::BED_INIT.text.as_bytes(),
        kernel.release.as_bytes(),
        kernel.version.as_bytes(),
    ]);
    let place = cache.root().join(format!("bed/initramfs-{mark}"));
    if place.is_file() {
        return Ok(place);
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
    cache.write(&place, &archive.finish())?;
    Ok(place)
}

fn read(path: &Path) -> Result<Vec<u8>, BedError> {
    Ok(fs::read(path).at(path)?)
}
