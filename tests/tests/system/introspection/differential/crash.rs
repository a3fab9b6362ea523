//! Debian's crash on a core file: it must open the file, recognise the kernel, and list the same
//! tasks as introspect.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use guests::external::crash::Crash;
use guests::host::cache::Cache;
use guests::kernel::Generation;

use super::introspected::IntrospectedCore;

/// Compares what crash reads from a core file. Does nothing for generations that crash does not
/// support.
///
/// # Errors
/// When crash cannot open the file or lists other tasks.
pub fn compare(
    generation: Generation,
    vmlinux: &Path,
    core: &Path,
    introspected: &IntrospectedCore,
) -> Result<()> {
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
    let release = release.with_context(|| format!("crash prints no release: {text}"))?;
    ensure!(
        release.starts_with(&format!("{generation}.")),
        "crash reads the release {release}"
    );
    if !lists_tasks(generation) {
        println!("{generation}: crash opens the core");
        return Ok(());
    }
    let listed: BTreeSet<u64> = text.lines().filter_map(task).collect();
    let expected: BTreeSet<u64> = introspected.tasks.keys().copied().collect();
    ensure!(
        listed == expected,
        "crash lists {} tasks, introspect {}: they differ in {:x?}",
        listed.len(),
        expected.len(),
        listed.symmetric_difference(&expected).collect::<Vec<_>>()
    );
    println!(
        "{generation}: crash lists the same {} tasks",
        expected.len()
    );
    Ok(())
}

/// Debian 12's crash is older than later kernels, and refuses them.
fn opens_cores_of(generation: Generation) -> bool {
    generation <= Generation::V6_1
}

/// Debian 12's crash is older than the layout that `struct pid` has in stable updates of 6.1 and
/// in later kernels: there it finds the idle tasks only.
fn lists_tasks(generation: Generation) -> bool {
    generation < Generation::V6_1
}

/// The address in a line of `ps`: `[>] PID PPID CPU TASK ST …`.
fn task(line: &str) -> Option<u64> {
    let mut words = line.trim_start_matches('>').split_whitespace();
    words.next()?.parse::<i32>().ok()?;
    u64::from_str_radix(words.nth(2)?, 16).ok()
}
