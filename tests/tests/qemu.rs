//! Core files that QEMU's `dump-guest-memory` writes, of stock kernels under QEMU: the same tasks
//! and stacks as the guest lists itself.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use guests::drive::build_outpatch;
use guests::drive::emulated::EmulatedSpec;
use guests::drive::{Emulated, Outpatch};
use guests::external::qemu::Qemu;
use guests::host::cache::Cache;
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use tests::task_listing;

/// Listing all stacks takes an emulated guest some seconds.
const LISTING_LIMIT: Duration = Duration::from_secs(180);
/// The minimum number of stacks that must be compared on each kernel.
const MIN_COMPARED: usize = 50;

#[test]
fn core_of_6_1() -> Result<()> {
    reads_what_qemu_dumps(Generation::V6_1)
}

#[test]
fn core_of_7_3() -> Result<()> {
    reads_what_qemu_dumps(Generation::V7_3)
}

fn reads_what_qemu_dumps(generation: Generation) -> Result<()> {
    let order = KernelSpec {
        generation,
        flavour: Flavour::Cloud,
        patches: &[],
        modules: &[],
        boot: None,
    };
    let stock = PreparedKernel::prepare(order)?;
    let scratch = env::temp_dir().join(format!(
        "outpatch-tests-qemu-{}-{generation}",
        std::process::id()
    ));
    fs::create_dir_all(&scratch)?;
    let compared = compare(&stock, &scratch);
    fs::remove_dir_all(&scratch)?;
    println!("{generation}: {} stacks equal", compared?);
    Ok(())
}

/// Compares the stacks of all sleepers; returns how many there are.
fn compare(stock: &PreparedKernel, scratch: &Path) -> Result<usize> {
    let spec = EmulatedSpec {
        kernel: &stock.bzimage,
        initrd: &stock.initrd,
        cpus: 2,
        memory_mib: 256,
    };
    let mut guest = Emulated::boot(&Qemu::fetch(&Cache::open()?)?, &spec, scratch)?;
    let listed = task_listing::parse(&own_listing(&mut guest)?)?;
    guest.stop()?;
    let core = scratch.join("qemu.core");
    guest.dump_guest_memory(&core)?;
    drop(guest);

    let outpatch = Outpatch::new(&build_outpatch()?, &scratch.join("none.sock"));
    let core = core.to_str().context("a scratch folder in UTF-8")?;
    let tasks = outpatch.of_core(&["ps"], core)?;
    let tasks = tasks.as_array().context("ps printed no list")?;
    let pids: BTreeSet<i64> = tasks
        .iter()
        .filter_map(|task| task["pid"].as_i64())
        .collect();
    let idle = tasks.iter().filter(|task| task["kind"] == "idle").count();
    ensure!(idle == 2, "{idle} idle tasks on 2 CPUs");
    let mut compared = 0;
    for (pid, (comm, frames)) in &listed {
        if !comm.starts_with("sleep-") {
            continue;
        }
        ensure!(pids.contains(pid), "{pid} {comm} is not in ps");
        let stack = outpatch.of_core(&["stack", &pid.to_string()], core)?;
        ensure!(stack["reliable"] == true, "{stack}");
        let read = task_listing::symbols(&stack)?;
        ensure!(
            &read == frames,
            "{pid} {comm}\noutpatch {read:?}\nguest    {frames:?}"
        );
        compared += 1;
    }
    ensure!(compared >= MIN_COMPARED, "only {compared} stacks compared");
    Ok(compared)
}

/// The guest's listing of its threads, with many sleepers among them.
fn own_listing(guest: &mut Emulated) -> Result<String> {
    let console = guest.console();
    // The guest puts the markers together, so that the echo of the command line does not contain
    // them.
    console.type_in(&format!(
        "stty -echo; sleeper 60 & sleep 3; printf '<%s>\\n' begin; {}; printf '<%s>\\n' end\n",
        task_listing::COMMAND
    ))?;
    console.wait_for("<begin>", LISTING_LIMIT)?;
    let text = console.wait_for("<end>", LISTING_LIMIT)?;
    Ok(text.trim_end_matches("<end>").replace('\r', ""))
}
