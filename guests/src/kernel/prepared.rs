//! A stock kernel with all that a guest boots from: image, initramfs, patches. And the `outpatch` binary to boot it with.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::cache::Cache;
use crate::initramfs::Initramfs;
use crate::kernel::{Flavour, Generation, Kernel};
use crate::kernel::{modules, patches};

/// Where a guest finds its kernel's own modules, and below it the file [`ORDER`].
const MODULES: &str = "/lib/modules";
/// The modules' files, a line each, in an order in which they can be loaded.
const ORDER: &str = "order";

/// What a guest is to have.
#[derive(Clone, Copy, Debug)]
pub struct KernelSpec<'a> {
    /// The generation of its kernel.
    pub generation: Generation,
    /// The flavour.
    pub flavour: Flavour,
    /// Patches, by name.
    pub patches: &'a [&'a str],
    /// The kernel's own modules; those that they need come with them.
    pub modules: &'a [&'a str],
    /// The kernel itself, in `/boot/vmlinuz`, and this initramfs in `/boot/initrd`: for a guest that starts another kernel.
    pub boot: Option<&'a Path>,
}

/// One stock kernel, ready to boot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreparedKernel {
    /// `uname -r`.
    pub release: String,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The initramfs, with the patches in `/lib/patches` and the kernel's modules in `/lib/modules`.
    pub initrd: PathBuf,
    /// Patches built for this kernel, by name.
    pub patches: BTreeMap<String, PathBuf>,
}

impl PreparedKernel {
    /// Fetches the newest kernel as ordered and builds what goes with it, or finds it all in the cache.
    ///
    /// # Errors
    /// When a package cannot be had or a patch cannot be built.
    pub fn prepare(spec: KernelSpec<'_>) -> Result<PreparedKernel> {
        let cache = Cache::open()?;
        let kernel = Kernel::fetch(&cache, spec.generation, spec.flavour)?;
        PreparedKernel::of(&cache, kernel, spec)
    }

    /// The newest kernel of a generation of which there is debugging information, bare, and its `vmlinux`.
    ///
    /// # Errors
    /// When a package cannot be had.
    pub fn prepare_debug(generation: Generation) -> Result<(PreparedKernel, PathBuf)> {
        let cache = Cache::open()?;
        let (kernel, vmlinux) = Kernel::fetch_debug(&cache, generation)?;
        let bare = KernelSpec {
            generation,
            flavour: kernel.flavour,
            patches: &[],
            modules: &[],
            boot: None,
        };
        Ok((PreparedKernel::of(&cache, kernel, bare)?, vmlinux))
    }

    fn of(cache: &Cache, kernel: Kernel, spec: KernelSpec<'_>) -> Result<PreparedKernel> {
        let mut initramfs = Initramfs::new();
        let mut built = BTreeMap::new();
        for name in spec.patches {
            let module = patches::build(cache, &kernel, name)?;
            initramfs = initramfs.with_file(&format!("/lib/patches/{name}.ko"), &module);
            built.insert((*name).to_owned(), module);
        }
        let mut files = String::new();
        for module in modules::with_dependencies(&kernel.modules, spec.modules)? {
            files.push_str(&format!("{MODULES}/{}\n", module.file));
            initramfs =
                initramfs.with_content(&format!("{MODULES}/{}", module.file), module.content);
        }
        if let Some(initrd) = spec.boot {
            initramfs = initramfs
                .with_file("/boot/vmlinuz", &kernel.bzimage)
                .with_file("/boot/initrd", initrd);
        }
        let initrd = initramfs
            .with_content(&format!("{MODULES}/{ORDER}"), files)
            .build(cache)?;
        Ok(PreparedKernel {
            release: kernel.release,
            bzimage: kernel.bzimage,
            initrd,
            patches: built,
        })
    }

    /// A patch of this kernel, as the command line wants it.
    ///
    /// # Errors
    /// When it was not asked for.
    pub fn patch(&self, name: &str) -> Result<&str> {
        let path = self
            .patches
            .get(name)
            .with_context(|| format!("no patch {name} for {}", self.release))?;
        path.to_str().context("a path that is no UTF-8")
    }
}
