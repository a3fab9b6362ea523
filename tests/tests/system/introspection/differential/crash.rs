//! Debian's crash on a core file: it must open it, know the kernel, and list the same tasks.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, ensure};
use guests::external::crash::Crash;
use guests::host::cache::Cache;
use guests::kernel::Generation;

use super::introspected::Ours;

/// Asks crash about a core.
///
/// # Errors
/// When crash cannot open it or lists other tasks. Of generations that it knows nothing of, it is not asked.
pub fn opens(generation: Generation, vmlinux: &Path, core: &Path, ours: &Ours) -> Result<()> {
    if !opens_cores_of(generation) {
        return Ok(());
    }
    let commands = core.with_extension("crash");
    fs::write(&commands, "sys\nps\nquit\n")?;
    let crash = Crash::fetch(&Cache::open()?)?;
    let mut command = crash.command();
    command.arg("-i").arg(&commands).arg(vmlinux).arg(core);
    let output = command.output().context("cannot start crash")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "crash: {}: {text}", output.status);
    let release = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("RELEASE: "));
    let release = release.with_context(|| format!("crash knows no release: {text}"))?;
    ensure!(
        release.starts_with(&format!("{generation}.")),
        "crash says that this is {release}"
    );
    if !lists_tasks(generation) {
        println!("{generation}: crash opens the core");
        return Ok(());
    }
    let listed: BTreeSet<u64> = text.lines().filter_map(task).collect();
    let mine: BTreeSet<u64> = ours.tasks.keys().copied().collect();
    ensure!(
        listed == mine,
        "crash lists {} tasks, introspect {}: they differ in {:x?}",
        listed.len(),
        mine.len(),
        listed.symmetric_difference(&mine).collect::<Vec<_>>()
    );
    println!("{generation}: crash lists the same {} tasks", mine.len());
    Ok(())
}

/// Debian 12's crash is older than the kernels after these, and says so.
fn opens_cores_of(generation: Generation) -> bool {
    generation <= Generation::V6_1
}

/// Debian 12's crash is older than the form that `struct pid` has in stable updates of 6.1 and ever since: there it finds the idle
/// tasks only.
fn lists_tasks(generation: Generation) -> bool {
    generation < Generation::V6_1
}

/// The address in a line of `ps`: `[>] PID PPID CPU TASK ST …`.
fn task(line: &str) -> Option<u64> {
    let mut words = line.trim_start_matches('>').split_whitespace();
    words.next()?.parse::<i32>().ok()?;
    u64::from_str_radix(words.nth(2)?, 16).ok()
}
