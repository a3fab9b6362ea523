//! Core files of stock 6.1 guests with many sleeping processes, for the benches: made once in the
//! test bed, and kept in the cache. Each is of a guest of its own.
//!
//! This module knows guests and files; it must not know what is measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use guests::bed::Bed;
use guests::drive::build_outpatch;
use guests::drive::{Guest, GuestSpec};
use guests::host::cache::{Cache, fingerprint};
use guests::initramfs::programs;
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use serde::{Deserialize, Serialize};

/// How many sleepers the guest of each core file has. Two of ten have another process or thread
/// that sleeps with them.
pub const SIZES: [u32; 6] = [10, 100, 1_000, 5_000, 10_000, 20_000];
/// The argument with which a bench is started inside the bed, before the file with the plan.
pub const INSIDE: &str = "--capture-inside";

/// The generation of the guests' kernel.
pub const GENERATION: Generation = Generation::V6_1;
/// The memory of a guest. A sleeper takes about 100 KiB: its stack, its page tables, its own pages.
const GUEST_MIB: u32 = 3 << 10;
/// The memory of the bed.
const BED_MIB: u32 = 5 << 10;
/// How long all of it may take: ten times what it takes on an idle host.
const LIMIT: Duration = Duration::from_secs(3000);
/// How long one dump may take.
const DUMP_LIMIT: Duration = Duration::from_secs(600);
/// How many seconds it may take until all sleepers sleep.
const MAX_START_SECONDS: u32 = 600;
/// The version of the core files: a change makes them from scratch.
const EDITION: &str = "1";

/// A core file.
#[derive(Clone, Debug)]
pub struct Core {
    /// The number of sleepers in its guest.
    pub sleepers: u32,
    /// The path of the file.
    pub path: PathBuf,
}

/// What is to be done in the bed.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    binary: PathBuf,
    stock: PreparedKernel,
    /// How many sleepers each guest is to have.
    sizes: Vec<u32>,
    /// The folder for the core files.
    folder: PathBuf,
}

/// The kernel's release, and all core files, smallest first. Those that do not exist are made.
///
/// # Errors
/// When a guest cannot be booted or dumped; the core files that exist by then are kept.
pub fn all() -> Result<(String, Vec<Core>)> {
    let cache = Cache::open()?;
    let stock = PreparedKernel::prepare(KernelSpec {
        generation: GENERATION,
        flavour: Flavour::Cloud,
        patches: &[],
        modules: &[],
        boot: None,
    })?;
    let sleeper = programs::GUEST_PROGRAMS
        .iter()
        .find(|source| source.name == "sleeper");
    let sleeper = sleeper.context("no sleeper among the guest's programs")?;
    let mark = fingerprint([sleeper.text.as_bytes(), EDITION.as_bytes()]);
    let place = cache.root().join(format!("cores/{}-{mark}", stock.release));
    let _lock = cache.lock("cores")?;
    fs::create_dir_all(&place)?;
    let is_missing = |sleepers: &u32| !place.join(name(*sleepers)).exists();
    let missing: Vec<u32> = SIZES.into_iter().filter(is_missing).collect();
    if !missing.is_empty() {
        let staging = cache.stage()?;
        let captured = capture(&stock, staging.path(), &missing);
        // A core file gets its name once it is complete, and is kept if others fail.
        for name in missing.iter().map(|sleepers| name(*sleepers)) {
            let core = staging.path().join(&name);
            if core.exists() {
                fs::rename(core, place.join(&name))?;
            }
        }
        captured?;
    }
    let cores = SIZES.map(|sleepers| Core {
        sleepers,
        path: place.join(name(sleepers)),
    });
    Ok((stock.release, cores.into()))
}

fn name(sleepers: u32) -> String {
    format!("{sleepers}.core")
}

/// On the host: starts this program a second time, inside the bed.
fn capture(stock: &PreparedKernel, folder: &Path, sizes: &[u32]) -> Result<()> {
    println!(
        "capturing cores of Linux {} with {sizes:?} sleepers in the test bed: some minutes, once",
        stock.release
    );
    let plan = Plan {
        binary: build_outpatch()?,
        stock: stock.clone(),
        sizes: sizes.to_vec(),
        folder: folder.to_owned(),
    };
    let file = folder.join("plan.json");
    fs::write(&file, serde_json::to_vec(&plan)?)?;
    let mut command = Command::new(env::current_exe()?);
    command.arg(INSIDE).arg(&file);
    let status = Bed::new()
        .memory_mib(BED_MIB)
        .writable(folder)
        .limit(LIMIT)
        .run(&mut command)
        .context("the test bed")?;
    ensure!(status.success(), "capturing in the bed: {status}");
    fs::remove_file(&file)?;
    Ok(())
}

/// In the bed: boots and dumps a guest for each number of sleepers.
///
/// # Errors
/// When a guest cannot be booted or dumped.
pub fn inside(plan: &Path) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&fs::read(plan)?)?;
    let spec = GuestSpec {
        vmm: plan.binary.clone(),
        binary: plan.binary,
        kernel: plan.stock.bzimage,
        initrd: plan.stock.initrd,
        cpus: 2,
        memory_mib: GUEST_MIB,
        append: String::new(),
    };
    for sleepers in plan.sizes {
        let path = plan.folder.join(name(sleepers));
        boot_and_dump(&spec, sleepers, &path).with_context(|| format!("{sleepers} sleepers"))?;
    }
    Ok(())
}

fn boot_and_dump(spec: &GuestSpec, sleepers: u32, path: &Path) -> Result<()> {
    let mut guest = Guest::boot(spec, &env::temp_dir())?;
    // More processes than a guest of this size permits by default.
    let limits =
        ["threads-max", "pid_max"].map(|of| format!("echo 100000 > /proc/sys/kernel/{of}"));
    guest.sh(&limits.join(" && "))?;
    start_sleepers(&mut guest, sleepers)?;
    let file = path.to_str().context("a path in UTF-8")?;
    let start = Instant::now();
    // The command stops waiting before an emulated VMM has written that much, and reports that the
    // dump may still complete.
    if let Err(error) = guest.outpatch().json(&["dump", file]) {
        while !path.exists() {
            if start.elapsed() > DUMP_LIMIT {
                return Err(error);
            }
            thread::sleep(Duration::from_secs(1));
        }
    }
    println!("{sleepers} sleepers: dumped in {:?}", start.elapsed());
    // The guest is not powered off: 20,000 processes take long to end.
    drop(guest);
    Ok(())
}

/// Starts this many sleepers, and waits until all sleep.
fn start_sleepers(guest: &mut Guest, sleepers: u32) -> Result<()> {
    // The fourth word of /proc/loadavg is the number of running tasks and of all tasks.
    let script = format!(
        "count() {{ read a b c tasks rest < /proc/loadavg; }}; count
         want=$((${{tasks#*/}} + {sleepers} * 12 / 10)); waited=0
         sleeper {sleepers} & sleep 1; count
         until [ ${{tasks#*/}} -ge $want ] && [ ${{tasks%/*}} = 1 ]; do
             if [ $waited -ge {MAX_START_SECONDS} ]; then
                 echo $tasks of $want; dmesg | tail; false; break
             fi
             waited=$((waited + 1)); sleep 1; count
         done"
    );
    guest.sh_within(&script, LIMIT)?;
    // The bed is slow: the last ones may still be about to sleep.
    guest.sh("sleep 2")?;
    Ok(())
}
