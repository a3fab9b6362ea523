//! What every scenario needs: kernels, initramfs and patches made on the host, a scratch folder, and the count of guests.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, anyhow, ensure};
use guests::drive::{Guest, GuestSpec, MEMORY_MIB};
use guests::kernel::stock::{Order, PreparedKernel, build_outpatch};
use guests::kernel::{Flavour, Generation};
use serde::{Deserialize, Serialize};

use crate::harness::kept_cores;
use crate::introspection::flavours;
use crate::patching::no_livepatch;

/// All that is made before the bed starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assets {
    /// The `outpatch` binary.
    pub binary: PathBuf,
    /// By generation: "5.10", "6.1", "6.12", "7.2", "7.3", and of other flavours "6.1-generic" and the like.
    pub stock: BTreeMap<String, PreparedKernel>,
}

impl Assets {
    /// Fetches and builds what is not there yet, once a process.
    pub fn prepare() -> Result<&'static Assets> {
        static ASSETS: OnceLock<Result<Assets, String>> = OnceLock::new();
        let made = ASSETS.get_or_init(|| Assets::make().map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|error| anyhow!(error.clone()))
    }
}

/// The patches that every kernel with headers gets built.
const PATCHES: [&str; 17] = [
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
];

/// The generation of which a guest can start another kernel of its kind.
pub const KEXEC: Generation = Generation::V6_12;

/// Modules of the kernel's own that every guest is given, with what they need: small, large, with exported symbols of both sorts.
/// None of them asks for another only when it is loaded, which a guest without modprobe cannot answer.
const MODULES: [&str; 4] = ["dummy", "nf_defrag_ipv6", "nfsd", "vhost_net"];

impl Assets {
    fn make() -> Result<Assets> {
        let mut stock = BTreeMap::new();
        for generation in Generation::ALL {
            // Headers, and a compiler that works with them, are to be had for these.
            let patches: &[&str] = match generation {
                Generation::V6_1 | Generation::V6_12 | Generation::V7_3 => &PATCHES,
                _ => &[],
            };
            let order = Order {
                generation,
                flavour: Flavour::Cloud,
                patches,
                modules: &MODULES,
                boot: None,
            };
            stock.insert(generation.to_string(), PreparedKernel::prepare(order)?);
        }
        let mut with_kernel = None;
        if let Some(plain) = stock.get(&KEXEC.to_string()) {
            with_kernel = Some(PreparedKernel::prepare(Order {
                generation: KEXEC,
                flavour: Flavour::Cloud,
                patches: &["pause"],
                modules: &[],
                boot: Some(&plain.initrd),
            })?);
        }
        stock.extend(with_kernel.map(|with| (format!("{KEXEC}-kexec"), with)));
        for (generation, flavour) in flavours::wanted() {
            let order = Order {
                generation,
                flavour,
                patches: &[],
                modules: &MODULES,
                boot: None,
            };
            stock.insert(
                flavours::key(generation, flavour),
                PreparedKernel::prepare(order)?,
            );
        }
        stock.extend(no_livepatch::stock()?.map(|stock| (no_livepatch::KEY.to_owned(), stock)));
        Ok(Assets {
            binary: build_outpatch()?,
            stock,
        })
    }
}

/// Counts of guests over all scenarios of this run.
#[derive(Debug, Default)]
pub struct Tally {
    boots: AtomicU64,
    lost: AtomicU64,
}

impl Tally {
    /// Adds what a scenario left in its scratch folder.
    pub fn add(&self, scratch: &Path) {
        let text = fs::read_to_string(scratch.join("guests")).unwrap_or_default();
        let count = |word: &str| text.lines().filter(|line| *line == word).count() as u64;
        self.boots.fetch_add(count("boot"), Ordering::Relaxed);
        self.lost.fetch_add(count("lost"), Ordering::Relaxed);
    }

    /// Guests started.
    pub fn boots(&self) -> u64 {
        self.boots.load(Ordering::Relaxed)
    }

    /// Guests lost, for whatever reason.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// A folder that goes when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new folder below the system's own for such things.
    pub fn new() -> Result<Scratch> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "outpatch-tests-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = env::temp_dir().join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover folder harms nothing.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The scenario's view, inside the bed.
#[derive(Debug)]
pub struct Fixture {
    /// What the host made.
    pub assets: Assets,
    scratch: PathBuf,
}

impl Fixture {
    /// Reads what the host made.
    pub fn load(spec: &Path) -> Result<Fixture> {
        let assets =
            serde_json::from_slice(&fs::read(spec).with_context(|| spec.display().to_string())?)?;
        let scratch = spec
            .parent()
            .context("the spec is in no folder")?
            .to_owned();
        Ok(Fixture { assets, scratch })
    }

    /// A generation.
    pub fn stock(&self, generation: &str) -> Result<&PreparedKernel> {
        self.assets
            .stock
            .get(generation)
            .with_context(|| format!("no kernel {generation}"))
    }

    /// A folder that the host sees as well.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// A folder that this scenario may write to; sockets go there as well.
    pub fn sockets(&self) -> PathBuf {
        env::temp_dir()
    }

    /// Boots a guest; a guest lost before its shell is reported, counted, and booted once more.
    pub fn boot(&self, generation: &str, cpus: u32, append: &str) -> Result<Guest> {
        self.boot_with(generation, cpus, MEMORY_MIB, append)
    }

    /// The same with another amount of memory.
    pub fn boot_with(
        &self,
        generation: &str,
        cpus: u32,
        memory_mib: u32,
        append: &str,
    ) -> Result<Guest> {
        let append = append.to_owned();
        let vmm = &self.assets.binary;
        self.boot_under(vmm, generation, (cpus, memory_mib), append)
    }

    /// The same with a program that runs the guest in the place of `outpatch`.
    pub fn boot_under(
        &self,
        vmm: &Path,
        generation: &str,
        (cpus, memory_mib): (u32, u32),
        append: String,
    ) -> Result<Guest> {
        let stock = self.stock(generation)?;
        let spec = GuestSpec {
            binary: self.assets.binary.clone(),
            vmm: vmm.to_owned(),
            kernel: stock.bzimage.clone(),
            initrd: stock.initrd.clone(),
            cpus,
            memory_mib,
            append,
        };
        let first = self.try_boot(&spec);
        match first {
            Ok(guest) => Ok(guest),
            Err(error) => {
                println!(
                    "LOST a {generation} guest with {cpus} vCPUs while it booted, once more: {error:#}"
                );
                self.try_boot(&spec)
            }
        }
    }

    fn try_boot(&self, spec: &GuestSpec) -> Result<Guest> {
        self.count("boot")?;
        let booted = Guest::boot(spec, &self.sockets());
        if booted.is_err() {
            self.count("lost")?;
        }
        booted
    }

    /// Runs `body` on the guest; if it fails and the guest is gone, that is counted.
    pub fn with(
        &self,
        mut guest: Guest,
        body: impl FnOnce(&mut Guest) -> Result<()>,
    ) -> Result<()> {
        if let Err(error) = body(&mut guest) {
            if !guest.is_running() {
                self.count("lost")?;
            } else if kept_cores::are_kept() {
                let core = self.scratch.join(kept_cores::OF_A_FAILURE);
                // What failed is to be told, not this.
                let _ = guest.outpatch().call(&["dump", &core.to_string_lossy()]);
            }
            return Err(error);
        }
        let status = guest.poweroff()?;
        ensure!(
            status.success(),
            "after poweroff the VMM ended with {status}"
        );
        Ok(())
    }

    fn count(&self, word: &str) -> Result<()> {
        let path = self.scratch.join("guests");
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)?;
        writeln!(file, "{word}").with_context(|| path.display().to_string())
    }
}
