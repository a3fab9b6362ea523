//! drgn on the same core, where it is installed.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::{
    cores::Core,
    report::{Figures, count},
};

/// The Python that has drgn, where that is not `python3`.
const PYTHON: &str = "OUTPATCH_PYTHON";
/// The kernel's vmlinux with DWARF, where it is not where Debian's `-dbg` package has it.
const VMLINUX: &str = "OUTPATCH_VMLINUX";
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
    let python = env::var_os(PYTHON).unwrap_or_else(|| "python3".into());
    let mut import = Command::new(&python);
    import.args(["-c", "import drgn"]).stderr(Stdio::null());
    if !import.status().is_ok_and(|status| status.success()) {
        println!(
            "\ndrgn is not installed: `pip install drgn` in a virtual environment, and {PYTHON}=…/bin/python3, for the ratio to it"
        );
        return Ok(());
    }
    let vmlinux = env::var_os(VMLINUX).map_or_else(
        || PathBuf::from(format!("/usr/lib/debug/boot/vmlinux-{release}")),
        PathBuf::from,
    );
    if !vmlinux.is_file() {
        println!(
            "\ndrgn needs {}: it is in Debian's linux-image-{release}-dbg; unpack it anywhere and set {VMLINUX}",
            vmlinux.display()
        );
        return Ok(());
    }
    let theirs = run(&python, &vmlinux, core)?;
    print(&theirs, ours);
    Ok(())
}

fn run(python: &std::ffi::OsStr, vmlinux: &Path, core: &Core) -> Result<Times> {
    let output = Command::new(python)
        .args(["-c", SCRIPT])
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
        "\ndrgn {}: {} tasks with pid and comm in {:.0} ms; outpatch: {} tasks with all fields in {:.2} ms: {:.0} times as fast a task",
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
        "drgn: {} stacks (a sample) with {} frames in {:.0} ms, {:.0} frames/s; outpatch, listing included: {:.0} frames/s: {:.0} times as fast a stack",
        theirs.stacks,
        theirs.frames,
        theirs.unwind * 1e3,
        count(theirs.frames) / theirs.unwind,
        count(ours.frames) / ours.stacks.seconds(),
        one_stack / our_stack
    );
}
