//! The main job, shown: boots a stock kernel, patches it from outside while it works, and takes the patch out again.
//!
//! Started again inside the test bed where the host's own KVM does not serve; what it prints is what it saw.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use guests::bed::Bed;
use guests::drive::build_outpatch;
use guests::drive::{Guest, GuestSpec, MEMORY_MIB, Outpatch};
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the outer run hands to the one inside the bed.
#[derive(Serialize, Deserialize)]
struct Parts {
    binary: std::path::PathBuf,
    stock: PreparedKernel,
}

const PATCH: &str = "livepatch-sample";
const SHOWN: &str = "cat /proc/cmdline";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    let result = match words.as_slice() {
        [_, flag, spec] if flag == "--inside" => {
            inside(Path::new(spec)).map(|()| ExitCode::SUCCESS)
        }
        [_] => outside(),
        _ => Err(anyhow::anyhow!("the demo takes no arguments")),
    };
    result.unwrap_or_else(|error| {
        eprintln!("demo: {error:#}");
        ExitCode::FAILURE
    })
}

fn outside() -> Result<ExitCode> {
    let bed = Bed::new();
    println!("KVM: {}", bed.probe());
    let spinner = busy("building outpatch");
    let binary = build_outpatch()?;
    spinner.finish_and_clear();
    bed.prepare()?;
    let stock = PreparedKernel::prepare(KernelSpec {
        generation: Generation::V6_12,
        flavour: Flavour::Cloud,
        patches: &[PATCH],
        modules: &[],
        boot: None,
    })?;
    let spec = env::temp_dir().join(format!("outpatch-demo-{}.json", std::process::id()));
    fs::write(&spec, serde_json::to_vec(&Parts { binary, stock })?)
        .with_context(|| spec.display().to_string())?;
    let mut again = Command::new(env::current_exe()?);
    again.arg("--inside").arg(&spec);
    let ended = bed.limit(Duration::from_secs(300)).run(&mut again);
    // Left behind it would harm nothing.
    let _ = fs::remove_file(&spec);
    let status = ended?;
    match status.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        _ => bail!("inside the test bed: {status}"),
    }
}

fn inside(spec: &Path) -> Result<()> {
    let parts: Parts = serde_json::from_slice(&fs::read(spec)?)?;
    let patch = parts.stock.patch(PATCH)?;
    let mut guest = boot(&parts)?;
    let outpatch = guest.outpatch().clone();
    guest.sh("spin 2 & sleeper 12 & sleep 1")?;
    let tasks = outpatch.json(&["ps"])?;
    println!(
        "the guest has {} tasks; two of its processes never leave user mode",
        tasks.as_array().map_or(0, Vec::len)
    );
    let before = show(&mut guest, "before")?;

    println!("\n$ outpatch apply {PATCH}.ko");
    watch(&outpatch, &["apply", patch])?;
    let after = show(&mut guest, "patched")?;
    ensure!(after != before, "the patch shows no effect");
    pauses(&outpatch)?;

    println!("\n$ outpatch revert livepatch_sample");
    watch(&outpatch, &["revert", "livepatch_sample"])?;
    let back = show(&mut guest, "reverted")?;
    ensure!(back == before, "the patch is out, but its effect is not");

    let taint = guest.sh("cat /proc/sys/kernel/tainted")?;
    ensure!(taint == "0", "the guest is tainted: {taint}");
    println!("\nthe guest is not tainted, loaded no module and ran no agent");
    let status = guest.poweroff()?;
    ensure!(
        status.success(),
        "after poweroff the VMM ended with {status}"
    );
    Ok(())
}

fn boot(parts: &Parts) -> Result<Guest> {
    let spinner = busy(&format!(
        "booting Linux {} with 2 vCPUs",
        parts.stock.release
    ));
    let started = Instant::now();
    let spec = GuestSpec {
        binary: parts.binary.clone(),
        vmm: parts.binary.clone(),
        kernel: parts.stock.bzimage.clone(),
        initrd: parts.stock.initrd.clone(),
        cpus: 2,
        memory_mib: MEMORY_MIB,
        append: String::new(),
    };
    let guest = Guest::boot(&spec, &env::temp_dir())?;
    spinner.finish_and_clear();
    println!(
        "booted stock Linux {} with 2 vCPUs in {:.1} s",
        parts.stock.release,
        started.elapsed().as_secs_f32()
    );
    Ok(guest)
}

fn show(guest: &mut Guest, when: &str) -> Result<String> {
    let seen = guest.sh(SHOWN)?;
    println!("{when:>8}, in the guest:  # {SHOWN}\n          {seen}");
    Ok(seen)
}

/// Runs a verb with its output on ours, as a user would see it.
fn watch(outpatch: &Outpatch, words: &[&str]) -> Result<()> {
    let status = outpatch
        .command(words)
        .status()
        .context("cannot start outpatch")?;
    ensure!(
        status.success(),
        "outpatch {} ended with {status}",
        words[0]
    );
    Ok(())
}

fn pauses(outpatch: &Outpatch) -> Result<()> {
    let status = outpatch.json(&["status"])?;
    let patch = status
        .pointer("/patches/0")
        .context("no patch in the status")?;
    let number = |path: &str| {
        patch
            .pointer(path)
            .and_then(Value::as_u64)
            .with_context(|| format!("no {path} in {patch}"))
    };
    println!(
        "the guest was paused {} times for {} us in all, {} us at the longest; the transition took {} ms",
        number("/pauses/count")?,
        number("/pauses/total_us")?,
        number("/pauses/longest_us")?,
        number("/transition_ms")?
    );
    Ok(())
}

fn busy(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    bar.set_style(ProgressStyle::default_spinner());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
