//! Prepares all files that a guest boots from: a kernel image, patches built for that kernel, and
//! an initramfs that contains them. This module must not know how the guest is run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::host::cache::Cache;
use crate::initramfs::Initramfs;
use crate::kernel::{Flavour, Generation, Kernel};
use crate::kernel::{modules, patches};

/// The folder in the guest that has the kernel's own modules and the file [`LOAD_ORDER`].
const MODULES: &str = "/lib/modules";
/// The file that lists the modules' paths, one a line, in an order in which they can be loaded.
const LOAD_ORDER: &str = "order";

/// What to prepare.
#[derive(Clone, Copy, Debug)]
pub struct KernelSpec<'a> {
    /// The kernel's generation.
    pub generation: Generation,
    /// The kernel's flavour.
    pub flavour: Flavour,
    /// The names of the patches to build; see [`patches::names`].
    pub patches: &'a [&'a str],
    /// The names of the kernel's own modules to include, with their dependencies.
    pub modules: &'a [&'a str],
    /// If set, the guest has its kernel as `/boot/vmlinuz` and this initramfs as `/boot/initrd`, so
    /// that it can start another kernel (kexec).
    pub boot: Option<&'a Path>,
}

/// A kernel that is ready to boot, with its patches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreparedKernel {
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// The path of the bzImage.
    pub bzimage: PathBuf,
    /// The path of the initramfs, which has the patches in `/lib/patches` and the kernel's modules
    /// in `/lib/modules`.
    pub initrd: PathBuf,
    /// The paths of the patches built for this kernel, by name, or why one was not built.
    pub patches: BTreeMap<String, std::result::Result<PathBuf, String>>,
}

impl PreparedKernel {
    /// Fetches the newest stock kernel that fits `spec` and builds its patches and initramfs, or
    /// finds them in the cache. A kernel whose patches cannot be built serves callers that need none:
    /// the cause is the error of [`patch`](Self::patch).
    ///
    /// # Errors
    /// When a package cannot be fetched or a program cannot be built.
    pub fn prepare(spec: KernelSpec<'_>) -> Result<PreparedKernel> {
        let cache = Cache::open()?;
        let kernel = Kernel::fetch(&cache, spec.generation, spec.flavour)?;
        PreparedKernel::of(&cache, kernel, spec)
    }

    /// Prepares the newest kernel of a generation that has debugging information, without patches.
    /// Returns the path of its `vmlinux` too.
    ///
    /// # Errors
    /// When a package cannot be fetched.
    pub fn prepare_debug(generation: Generation) -> Result<(PreparedKernel, PathBuf)> {
        let cache = Cache::open()?;
        let (kernel, vmlinux) = Kernel::fetch_debug(&cache, generation)?;
        let spec = KernelSpec {
            generation,
            flavour: kernel.flavour,
            patches: &[],
            modules: &[],
            boot: None,
        };
        Ok((PreparedKernel::of(&cache, kernel, spec)?, vmlinux))
    }

    fn of(cache: &Cache, kernel: Kernel, spec: KernelSpec<'_>) -> Result<PreparedKernel> {
        let mut initramfs = Initramfs::new();
        let mut built = BTreeMap::new();
        // All patches but the sample are built at once, so one cause is that of each.
        let mut causes: BTreeMap<bool, String> = BTreeMap::new();
        for name in spec.patches {
            let is_sample = *name == patches::SAMPLE;
            let module = match causes.get(&is_sample) {
                Some(cause) => Err(cause.clone()),
                None => patches::build(cache, &kernel, name).map_err(|e| e.to_string()),
            };
            match &module {
                Ok(path) => {
                    initramfs = initramfs.with_file(&format!("/lib/patches/{name}.ko"), path);
                }
                Err(cause) => drop(causes.insert(is_sample, cause.clone())),
            }
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
            .with_content(&format!("{MODULES}/{LOAD_ORDER}"), files)
            .build(cache)?;
        Ok(PreparedKernel {
            release: kernel.release,
            bzimage: kernel.bzimage,
            initrd,
            patches: built,
        })
    }

    /// The path of the patch `name`, as an argument for the command line.
    ///
    /// # Errors
    /// When the patch was not in the [`KernelSpec`], or could not be built.
    pub fn patch(&self, name: &str) -> Result<&str> {
        let path = self
            .patches
            .get(name)
            .with_context(|| format!("no patch {name} for {}", self.release))?
            .as_ref()
            .map_err(|cause| anyhow!("no patch {name} for {}: {cause}", self.release))?;
        path.to_str().context("the patch's path is not UTF-8")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_of_a_patch_that_was_not_built_reaches_the_bed() {
        let kernel = PreparedKernel {
            release: "9.9".to_owned(),
            bzimage: PathBuf::new(),
            initrd: PathBuf::new(),
            patches: BTreeMap::from([
                ("good".to_owned(), Ok(PathBuf::from("/good.ko"))),
                ("bad".to_owned(), Err("no compiler".to_owned())),
            ]),
        };
        let text = serde_json::to_string(&kernel).unwrap();
        let inside: PreparedKernel = serde_json::from_str(&text).unwrap();
        assert_eq!(inside.patch("good").unwrap(), "/good.ko");
        let error = inside.patch("bad").unwrap_err().to_string();
        assert_eq!(error, "no patch bad for 9.9: no compiler");
        assert!(inside.patch("other").is_err());
    }
}
