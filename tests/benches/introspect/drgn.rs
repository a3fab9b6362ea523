//! drgn on the same core, where it is installed.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use guests::external::drgn::Drgn;
use guests::host::cache::Cache;
use guests::kernel::stock::PreparedKernel;
use serde::Deserialize;

use crate::report::{Figures, count};
use tests::sleeper_cores::{Core, GENERATION};

/// When it is set, drgn and the kernel's debugging information are fetched into the cache.
const FETCH: &str = "OUTPATCH_DRGN";
const SCRIPT: &str = include_str!("drgn.py");
/// drgn takes milliseconds for each stack: as many as this are enough.
const SAMPLE: usize = 200;

/// What the script prints.
#[derive(Debug, Deserialize)]
struct Times {
    version: String,
    tasks: usize,
    list: f64,
    stacks: usize,
    frames: usize,
    unwind: f64,
}

/// Runs drgn on `core`, and prints how many times faster `ours` is; or what is missing to do so.
///
/// # Errors
/// When drgn is there and fails.
pub fn beside(core: &Core, release: &str, ours: &Figures) -> Result<()> {
    let Some((python, vmlinux)) = find(release)? else {
        println!(
            "\nno drgn beside it: python3 cannot import drgn, or there is no /usr/lib/debug/boot/vmlinux-{release}; {FETCH}=1 fetches both into the cache"
        );
        return Ok(());
    };
    let theirs = run(python, &vmlinux, core)?;
    print(&theirs, ours);
    Ok(())
}

/// A Python that has drgn, with the script as its last argument so far, and the kernel's vmlinux.
fn find(release: &str) -> Result<Option<(Command, PathBuf)>> {
    if env::var_os(FETCH).is_some() {
        let (stock, vmlinux) = PreparedKernel::prepare_debug(GENERATION)?;
        ensure!(
            stock.release == release,
            "the cores are of Linux {release}, and debugging information is for {}",
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

fn print(theirs: &Times, ours: &Figures) {
    let one_list = theirs.list / count(theirs.tasks);
    let our_list = ours.list.seconds() / count(ours.tasks);
    println!(
        "\nthe same core read by drgn {}, in CPU time: {} tasks with pid and comm in {:.0} ms; outpatch: {} tasks with all fields in {:.2} ms: {:.0} times as fast a task",
        theirs.version,
        theirs.tasks,
        theirs.list * 1e3,
        ours.tasks,
        ours.list.seconds() * 1e3,
        one_list / our_list
    );
    let one_stack = theirs.unwind / count(theirs.stacks);
    let our_stack = ours.stacks.seconds() / count(ours.tasks);
    println!(
        "drgn: {} stacks (a sample) with {} frames, inlined ones counted, in {:.0} ms, {:.0} frames/s; outpatch, listing included: {:.0} frames/s: {:.0} times as fast a stack",
        theirs.stacks,
        theirs.frames,
        theirs.unwind * 1e3,
        count(theirs.frames) / theirs.unwind,
        count(ours.frames) / ours.stacks.seconds(),
        one_stack / our_stack
    );
}
