//! A patch whose code the guest's kernel knows by its address: faults, warnings, stacks and kprobes
//! in it are as in a module that the guest has loaded itself, and nothing lists it.
//!
//! All checks of one kernel share a guest, in this order: the last one leaves a forced patch in it,
//! and has the guest load a livepatch.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::blocked_tasks::TIMED_OUT;

/// The function of the patch in which `cat /proc/version` sleeps.
const SLEEPS: &str = "sleeps_show";
/// What `cat /proc/loadavg` prints while the patch is in force.
const FAULTED: &str = "faults: error -14";
/// How long a transition may take once nothing blocks it. One by the guest's own livepatching takes
/// up to 26 s in an emulated guest.
const TRANSITION_LIMIT: Duration = Duration::from_secs(90);
/// How long one call of a tool may take.
const LIMIT: Duration = Duration::from_secs(60);

pub fn scenarios() -> Vec<Scenario> {
    ["6.1", "6.12", "7.3"]
        .map(|generation| {
            let name = format!("registration::patch_code_is_known_{generation}");
            let run = move |fixture: &Fixture| all(fixture, generation);
            Scenario::new(name, run).extra_if(generation != "6.12")
        })
        .into()
}

fn all(fixture: &Fixture, generation: &str) -> Result<()> {
    let patch = fixture.kernel(generation)?.patch("faults")?;
    let other = fixture.kernel(generation)?.patch("cmdline")?;
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        let outpatch = guest.outpatch().clone();
        let before = listed(guest)?;
        outpatch.ok(&["apply", patch])?;
        faults_and_warnings(guest).context("faults and warnings")?;
        ensure!(listed(guest)? == before, "the guest lists the patch");
        modules_come_and_go(guest, &outpatch, other).context("modules come and go")?;
        a_kprobe_holds_the_patch(guest, &outpatch).context("a kprobe")?;
        outpatch.ok(&["revert", "faults"])?;
        let average = guest.sh("cat /proc/loadavg")?;
        ensure!(!average.contains("faults"), "still in force: {average}");
        rounds(guest, &outpatch, patch).context("rounds")?;
        the_guest_walks_its_stacks(guest, &outpatch, patch).context("stacks")
    })
}

/// What the guest lists of modules: their names, and all of their symbols.
fn listed(guest: &mut Guest) -> Result<String> {
    guest.sh("cat /proc/modules; ls /sys/module; grep -E 'faults|outpatch' /proc/kallsyms || true")
}

/// A fault in the patch's code is handled, and its warning is given once, with the function's name.
fn faults_and_warnings(guest: &mut Guest) -> Result<()> {
    let log = guest.dmesg()?;
    for _ in 0..3 {
        let line = guest.sh("cat /proc/loadavg")?;
        ensure!(line == FAULTED, "{line}");
    }
    let new = guest.dmesg_since(&log)?;
    let warnings = new.iter().filter(|line| line.contains("WARNING:"));
    ensure!(warnings.count() == 1, "not one warning: {new:#?}");
    let mut traced = new.iter();
    ensure!(
        traced.any(|line| line.contains("faults_show+0x") && line.contains("[faults]")),
        "the warning does not name the function: {new:#?}"
    );
    for part in ["seq_read", "entry_SYSCALL_64"] {
        let mut lines = new.iter();
        ensure!(
            lines.any(|line| line.contains(part) && !line.contains("? ")),
            "the trace does not lead through the patch to {part}: {new:#?}"
        );
    }
    Ok(())
}

/// The guest loads and unloads modules, and another patch comes and goes, in every order: the
/// kernel's tables stay as it needs them.
fn modules_come_and_go(guest: &mut Guest, outpatch: &Outpatch, other: &str) -> Result<()> {
    let log = guest.dmesg()?;
    guest.sh("insmod $(grep /dummy.ko /lib/modules/order)")?;
    outpatch.ok(&["apply", other])?;
    guest.sh("insmod $(grep /nf_defrag_ipv6.ko /lib/modules/order) && rmmod dummy")?;
    outpatch.ok(&["revert", "cmdline"])?;
    guest
        .sh("insmod $(grep /dummy.ko /lib/modules/order) && rmmod nf_defrag_ipv6 && rmmod dummy")?;
    let line = guest.sh("cat /proc/loadavg")?;
    ensure!(line == FAULTED, "{line}");
    let new = guest.dmesg_since(&log)?;
    ensure!(new.iter().all(|line| !line.contains("BUG")), "{new:#?}");
    Ok(())
}

/// A kprobe in the patch's code works, and the patch cannot be reverted until it is removed.
fn a_kprobe_holds_the_patch(guest: &mut Guest, outpatch: &Outpatch) -> Result<()> {
    let pid = start_sleeper(guest)?;
    let frame = frame(outpatch, &pid)?;
    guest.sh(&format!(
        "insmod /lib/patches/kprobe-at.ko address={frame} && kill -9 {pid} && sleep 1"
    ))?;
    let line = outpatch.refused(&["revert", "faults"])?;
    ensure!(line.contains("kprobe") && line.contains("faults"), "{line}");
    println!("held by a kprobe: {line}");
    let line = guest.sh("cat /proc/loadavg")?;
    ensure!(line == FAULTED, "{line}");
    let log = guest.dmesg()?;
    guest.sh("rmmod kprobe_at")?;
    let new = guest.dmesg_since(&log)?;
    let hit = new.iter().any(|line| line.contains("kprobe_at: 1 hits"));
    ensure!(hit, "the kprobe was not hit once: {new:#?}");
    Ok(())
}

/// Many rounds, with other modules between them: memory is used again only when it is free.
fn rounds(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    for round in 0..20 {
        outpatch.ok(&["apply", patch])?;
        let line = guest.sh("cat /proc/loadavg")?;
        ensure!(line == FAULTED, "round {round}: {line}");
        guest.sh("insmod $(grep /dummy.ko /lib/modules/order)")?;
        outpatch.ok(&["revert", "faults"])?;
        guest.sh("rmmod dummy; cat /proc/[0-9]*/stack > /dev/null")?;
    }
    Ok(())
}

/// The guest's own stack of a task that sleeps in the patch leads to its end, with the patch's
/// names. The guest's own livepatching finds it reliable: it loads a livepatch while a task sleeps in
/// the code of a patch that was forced out.
fn the_guest_walks_its_stacks(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    outpatch.ok(&["apply", patch])?;
    let pid = start_sleeper(guest)?;
    let stack = guest.sh(&format!("cat /proc/{pid}/stack"))?;
    ensure!(
        stack.contains(&format!("{SLEEPS}+0x")) && stack.contains("[faults]"),
        "the guest does not name the function: {stack}"
    );
    ensure!(
        stack.contains("entry_SYSCALL_64"),
        "the guest's walk does not pass the function: {stack}"
    );
    let reply = outpatch.call(&["revert", "faults", "--timeout", "2"])?;
    ensure!(reply.status == Some(TIMED_OUT), "{}", reply.stderr);
    outpatch.ok(&["force", "faults"])?;
    guest.sh("insmod /lib/patches/livepatch-sample.ko")?;
    let transition = "/sys/kernel/livepatch/livepatch_sample/transition";
    let deadline = Instant::now() + TRANSITION_LIMIT;
    while guest.sh(&format!("cat {transition}"))? != "0" {
        if Instant::now() > deadline {
            bail!("the guest's own livepatching does not pass the sleeping task");
        }
        thread::sleep(Duration::from_secs(1));
    }
    let line = guest.sh("cat /proc/cmdline")?;
    ensure!(line.contains("live patched"), "{line}");
    let stack = guest.sh(&format!("cat /proc/{pid}/stack; kill -9 {pid}"))?;
    ensure!(stack.contains(SLEEPS), "the task did not sleep on: {stack}");
    Ok(())
}

/// Starts a task that sleeps in the patch; returns its pid.
fn start_sleeper(guest: &mut Guest) -> Result<String> {
    let (status, pid) = guest.try_sh("cat /proc/version > /dev/null & echo $!; sleep 1", LIMIT)?;
    ensure!(status == 0, "{pid}");
    Ok(pid.trim().to_owned())
}

/// The address at which the task goes on in the patch.
fn frame(outpatch: &Outpatch, pid: &str) -> Result<String> {
    let stack = outpatch.json(&["stack", pid])?;
    let frames = stack["frames"].as_array().context("no frames")?.iter();
    let mut inside = frames.filter(|frame| {
        let name = frame["symbol"].as_str().unwrap_or_default();
        name.starts_with(SLEEPS)
    });
    let ip = inside.next().map(|frame| &frame["ip"]);
    let ip = ip
        .and_then(Value::as_str)
        .context("no frame in the patch")?;
    Ok(ip.to_owned())
}
