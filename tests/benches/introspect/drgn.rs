//! drgn on the same core file, where it is installed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use guests::external::drgn::Drgn;
use guests::host::cache::Cache;
use guests::kernel::prepared::PreparedKernel;
use serde::Deserialize;
use tests::sleeper_cores::{Core, GENERATION};

use crate::report::{Figures, count};

/// Environment variable: when set, drgn and the kernel's debugging information are fetched into the
/// cache.
const FETCH: &str = "OUTPATCH_DRGN";
const SCRIPT: &str = include_str!("drgn.py");
/// How many stacks drgn unwinds: it takes milliseconds for each.
const SAMPLE: usize = 200;

/// What the script prints; times are in seconds.
#[derive(Debug, Deserialize)]
struct Times {
    version: String,
    tasks: usize,
    list: f64,
    stacks: usize,
    frames: usize,
    unwind: f64,
}

/// Runs drgn on `core`, and prints how many times as fast introspect is, which `figures` are of; or
/// what is missing to do so.
///
/// # Errors
/// When drgn is installed and fails.
pub fn compare(core: &Core, release: &str, figures: &Figures) -> Result<()> {
    let Some((python, vmlinux)) = find(release)? else {
        println!(
            "\nnot compared with drgn: python3 cannot import drgn, or there is no \
             /usr/lib/debug/boot/vmlinux-{release}; {FETCH}=1 fetches both into the cache"
        );
        return Ok(());
    };
    let times = run(python, &vmlinux, core)?;
    print(&times, figures);
    Ok(())
}

/// A command that runs the script with drgn, without the script's arguments, and the kernel's
/// vmlinux.
fn find(release: &str) -> Result<Option<(Command, PathBuf)>> {
    if env::var_os(FETCH).is_some() {
        let (stock, vmlinux) = PreparedKernel::prepare_debug(GENERATION)?;
        ensure!(
            stock.release == release,
            "the core files are of Linux {release}, and debugging information is for {}",
            stock.release
        );
        let mut python = Drgn::fetch(&Cache::open()?)?.command(Path::new("-c"));
        python.arg(SCRIPT);
        return Ok(Some((python, vmlinux)));
    }
    let mut import = Command::new("python3");
    import.args(["-c", "import drgn"]).stderr(Stdio::null());
    let vmlinux = PathBuf::from(format!("/usr/lib/debug/boot/vmlinux-{release}"));
    let found = vmlinux.is_file() && import.status().is_ok_and(|status| status.success());
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT]);
    Ok(found.then_some((python, vmlinux)))
}

fn run(mut python: Command, vmlinux: &Path, core: &Core) -> Result<Times> {
    let output = python
        .args([vmlinux, &core.path])
        .arg(SAMPLE.to_string())
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "drgn: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn print(drgn: &Times, figures: &Figures) {
    let drgn_task = drgn.list / count(drgn.tasks);
    let task = figures.list.seconds() / count(figures.tasks);
    println!(
        "\nthe same core file read by drgn {}, in CPU time: {} tasks with pid and comm in \
         {:.0} ms; outpatch: {} tasks with all fields in {:.2} ms: {:.0} times as fast per task",
        drgn.version,
        drgn.tasks,
        drgn.list * 1e3,
        figures.tasks,
        figures.list.seconds() * 1e3,
        drgn_task / task
    );
    let drgn_stack = drgn.unwind / count(drgn.stacks);
    let stack = figures.stacks.seconds() / count(figures.tasks);
    println!(
        "drgn: {} stacks (a sample) with {} frames, with inlined ones, in {:.0} ms, \
         {:.0} frames/s; outpatch, listing included: {:.0} frames/s: {:.0} times as fast per stack",
        drgn.stacks,
        drgn.frames,
        drgn.unwind * 1e3,
        count(drgn.frames) / drgn.unwind,
        count(figures.frames) / figures.stacks.seconds(),
        drgn_stack / stack
    );
}
