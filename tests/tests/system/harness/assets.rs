//! What is made on the host before a bed starts: the `outpatch` binary, and kernels with the
//! initramfs and the patches that go with them.
//!
//! This module knows what most scenarios need; what a single one needs besides, it adds itself
//! (`Scenario::prepare`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use guests::bed::Bed;
use guests::drive::build_outpatch;
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use serde::{Deserialize, Serialize};

/// The patches that are built for every kernel with headers.
const PATCHES: [&str; 25] = [
    "livepatch-sample",
    "cmdline",
    "getpid",
    "replacing",
    "two-functions",
    "not-livepatch",
    "unknown-function",
    "unknown-symbol",
    "wrong-sympos",
    "callbacks",
    "pause",
    "kinds",
    "kthread",
    "worker",
    "percpu",
    "module-object",
    "features",
    "init-value",
    "obstacles",
    "exit-work",
    "faults",
    "kprobe-at",
    "constant",
    "rcu-callback",
    "timer",
];

/// The kernel's own modules that every guest gets, with the modules that they depend on: small,
/// large, with exported symbols of both kinds. None of them requests another one only when it is
/// loaded, which a guest without modprobe cannot answer.
pub const MODULES: [&str; 4] = ["dummy", "nf_defrag_ipv6", "nfsd", "vhost_net"];

/// Whether modules can be built for this generation: Debian has headers, and a compiler that works
/// with them, for some.
pub fn has_modules(generation: Generation) -> bool {
    matches!(
        generation,
        Generation::V6_1 | Generation::V6_12 | Generation::V7_3
    )
}

/// All that is made before a bed starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assets {
    /// The `outpatch` binary.
    pub binary: PathBuf,
    /// Kernels by name: each generation's cloud flavour under the generation ("6.1"), and those
    /// that the scenario added.
    pub kernels: BTreeMap<String, PreparedKernel>,
    /// Why kernels are missing, by the same name: only the scenarios that need one fail.
    pub missing: BTreeMap<String, String>,
    /// The `vmlinux` with debugging information of the kernels that a scenario added with it, by
    /// the same name.
    pub vmlinux: BTreeMap<String, PathBuf>,
}

impl Assets {
    /// Fetches and builds what is not there yet, once in a process.
    pub fn prepare() -> Result<&'static Assets> {
        static ASSETS: OnceLock<Result<Assets, String>> = OnceLock::new();
        let made = ASSETS.get_or_init(|| Assets::make().map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|error| anyhow!(error.clone()))
    }

    /// The kernel of this name: a generation, or what the scenario added.
    pub fn kernel(&self, name: &str) -> Result<&PreparedKernel> {
        self.kernels.get(name).ok_or_else(|| {
            let cause = self.missing.get(name);
            anyhow!(
                "no kernel {name}: {}",
                cause.map_or("no scenario added it", |c| c)
            )
        })
    }

    fn make() -> Result<Assets> {
        Bed::new().check()?;
        let (mut kernels, mut missing) = (BTreeMap::new(), BTreeMap::new());
        for generation in Generation::ALL {
            let patches: &[&str] = if has_modules(generation) {
                &PATCHES
            } else {
                &[]
            };
            let order = KernelSpec {
                generation,
                flavour: Flavour::Cloud,
                patches,
                modules: &MODULES,
                boot: None,
            };
            let name = generation.to_string();
            match PreparedKernel::prepare(order) {
                Ok(kernel) => drop(kernels.insert(name, kernel)),
                Err(error) => drop(missing.insert(name, format!("{error:#}"))),
            }
        }
        Ok(Assets {
            binary: build_outpatch()?,
            kernels,
            missing,
            vmlinux: BTreeMap::new(),
        })
    }
}
