//! `cargo demo`: boots a stock kernel, patches it from outside while it runs, and reverts
//! the patch.
//!
//! Where the host's own KVM does not run stock kernels, the program starts itself once more inside
//! the test bed. It shows what the guest prints before and after, and between them the output of
//! `outpatch apply` and `outpatch revert` as it is. It must not depend on what these print.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use guests::bed::Bed;
use guests::drive::{Guest, GuestSpec, MEMORY_MIB, Outpatch, build_outpatch};
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// What the demo on the host hands to the one inside the bed.
#[derive(Serialize, Deserialize)]
struct Plan {
    outpatch: PathBuf,
    kernel: PreparedKernel,
}

/// The patch's file, without `.ko`: the kernel's own sample, which replaces `/proc/cmdline`.
const PATCH_FILE: &str = "livepatch-sample";
/// The patch's name.
const PATCH: &str = "livepatch_sample";
/// The command whose output the patch changes.
const COMMAND: &str = "cat /proc/cmdline";
const VCPUS: u32 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    let result = match arguments.as_slice() {
        [_, flag, plan] if flag == "--inside" => {
            inside(Path::new(plan)).map(|()| ExitCode::SUCCESS)
        }
        [_] => outside(),
        _ => Err(anyhow::anyhow!("the demo takes no arguments")),
    };
    result.unwrap_or_else(|error| {
        eprintln!("demo: {error:#}");
        ExitCode::FAILURE
    })
}

/// Fetches and builds everything, then runs [`inside`] in the bed.
fn outside() -> Result<ExitCode> {
    let bed = Bed::new();
    println!("KVM: {}", bed.probe());
    bed.check()?;
    let bar = spinner("building outpatch");
    let outpatch = build_outpatch()?;
    bar.finish_and_clear();
    bed.prepare()?;
    let kernel = PreparedKernel::prepare(KernelSpec {
        generation: Generation::V6_12,
        flavour: Flavour::Cloud,
        patches: &[PATCH_FILE],
        modules: &[],
        boot: None,
    })?;
    kernel.patch(PATCH_FILE)?;
    let file = env::temp_dir().join(format!("outpatch-demo-{}.json", std::process::id()));
    fs::write(&file, serde_json::to_vec(&Plan { outpatch, kernel })?)
        .with_context(|| file.display().to_string())?;
    let mut command = Command::new(env::current_exe()?);
    command.arg("--inside").arg(&file);
    let ended = bed.limit(Duration::from_secs(300)).run(&mut command);
    // A file that is left in the temporary folder does no harm.
    let _ = fs::remove_file(&file);
    let status = ended?;
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        _ => bail!("inside the test bed: {status}"),
    }
}

fn inside(plan: &Path) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&fs::read(plan)?)?;
    let mut guest = boot(&plan)?;
    let outpatch = guest.outpatch().clone();
    guest.sh("spin 2 & sleeper 12 & sleep 1")?;
    let tasks = outpatch.json(&["ps"])?;
    println!(
        "The guest has {} tasks; two of its processes never leave user mode by themselves.",
        tasks.as_array().map_or(0, Vec::len)
    );
    let before = show(&mut guest, "Before")?;

    println!("\n$ outpatch apply {PATCH_FILE}.ko");
    run(&outpatch, &["apply", plan.kernel.patch(PATCH_FILE)?])?;
    let after = show(&mut guest, "Patched")?;
    ensure!(after != before, "the patch has no effect");

    println!("\n$ outpatch revert {PATCH}");
    run(&outpatch, &["revert", PATCH])?;
    let reverted = show(&mut guest, "Reverted")?;
    ensure!(
        reverted == before,
        "the patch is reverted, but still has its effect"
    );

    let taint = guest.sh("cat /proc/sys/kernel/tainted")?;
    ensure!(taint == "0", "the guest is tainted: {taint}");
    println!("\nThe guest is not tainted, loaded no module and ran no agent.");
    let status = guest.poweroff()?;
    ensure!(
        status.success(),
        "after poweroff the VMM ended with {status}"
    );
    Ok(())
}

fn boot(plan: &Plan) -> Result<Guest> {
    let release = &plan.kernel.release;
    let bar = spinner(&format!("booting Linux {release} with {VCPUS} vCPUs"));
    let started = Instant::now();
    let spec = GuestSpec {
        binary: plan.outpatch.clone(),
        vmm: plan.outpatch.clone(),
        kernel: plan.kernel.bzimage.clone(),
        initrd: plan.kernel.initrd.clone(),
        cpus: VCPUS,
        memory_mib: MEMORY_MIB,
        append: String::new(),
    };
    let guest = Guest::boot(&spec, &env::temp_dir())?;
    bar.finish_and_clear();
    println!(
        "Booted stock Linux {release} with {VCPUS} vCPUs in {:.1} s.",
        started.elapsed().as_secs_f32()
    );
    Ok(guest)
}

/// Runs [`COMMAND`] in the guest; prints and returns its output.
fn show(guest: &mut Guest, when: &str) -> Result<String> {
    let output = guest.sh(COMMAND)?;
    println!("{when}, in the guest:\n  # {COMMAND}\n  {output}");
    Ok(output)
}

/// Runs a command of `outpatch` with this program's standard output, as a user would see it.
fn run(outpatch: &Outpatch, arguments: &[&str]) -> Result<()> {
    let status = outpatch
        .command(arguments)
        .status()
        .context("cannot start outpatch")?;
    ensure!(
        status.success(),
        "outpatch {} ended with {status}",
        arguments[0]
    );
    Ok(())
}

fn spinner(message: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message.to_owned());
    bar.set_style(ProgressStyle::default_spinner());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
