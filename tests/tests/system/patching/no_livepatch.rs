//! A guest whose kernel has no `CONFIG_LIVEPATCH`: its tasks have no patch state, and with
//! TIF_PATCH_PENDING set a task would loop on exit to user mode permanently. Which tasks have not
//! switched is in a table of outpatch's own, in hidden memory.
//!
//! Debian has no such kernel: a small one is built from its source, which takes some minutes the
//! first time, so this runs when `OUTPATCH_TEST_NO_LIVEPATCH` is in the environment.

use std::{env, fs};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};
use guests::kernel::{Generation, no_livepatch};
use serde_json::Value;

use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::apply_revert::TRANSITION_LIMIT;
use crate::patching::blocked_tasks::{
    blockers_wait, end_of_transition, list, pausing, the_patch, times_out, waiting,
};

/// Environment variable that requests the scenario.
const VARIABLE: &str = "OUTPATCH_TEST_NO_LIVEPATCH";
/// The name of the kernel among the assets.
const KEY: &str = "no-livepatch";
/// How often each patch is applied and reverted under load.
const ROUNDS: u32 = 50;

pub fn scenarios() -> Vec<Scenario> {
    let name = "no_livepatch::switches_by_a_table_of_its_own";
    let is_requested = env::var_os(VARIABLE).is_some();
    vec![
        Scenario::new(name, switches)
            .prepare(prepare)
            .only_if(is_requested),
    ]
}

/// On the host: builds the kernel and its patches.
fn prepare(assets: &mut Assets) -> Result<()> {
    let patches = ["cmdline", "getpid", "pause"];
    let kernel = no_livepatch::prepare(Generation::V6_12, &patches)?;
    assets.kernels.insert(KEY.to_owned(), kernel);
    Ok(())
}

fn switches(fixture: &Fixture) -> Result<()> {
    for cpus in [1, 2, 4] {
        fixture.with(fixture.boot(KEY, cpus, "")?, |guest| {
            let log = guest.dmesg()?;
            it_has_none(guest)?;
            under_load(fixture, guest)?;
            blocked(fixture, guest)?;
            println!("without CONFIG_LIVEPATCH, {cpus} vCPUs: all tasks switched as they should");
            guest.expect_unharmed(&log)
        })?;
    }
    Ok(())
}

/// Checks that the guest has no livepatching.
fn it_has_none(guest: &mut Guest) -> Result<()> {
    let found =
        guest.sh("ls -d /sys/kernel/livepatch /proc/self/patch_state 2>/dev/null || true")?;
    ensure!(found.is_empty(), "the guest has livepatching: {found}");
    let tasks = guest.outpatch().json(&["ps"])?;
    let mut states = list(&tasks, "")?.iter().map(|task| &task["patch_state"]);
    ensure!(states.all(Value::is_null), "{tasks}");
    Ok(())
}

/// A system call that processes call all the time changes its result, and no call returns a wrong
/// one.
fn under_load(fixture: &Fixture, guest: &mut Guest) -> Result<()> {
    let rest = guest.rest();
    guest.sh("sleeper 16 & hammer 8 /tmp/hammer & sleep 1")?;
    let kernel = fixture.kernel(KEY)?;
    for (file, probe, sign) in [
        ("getpid", "hammer 0 - getpid", "new"),
        ("cmdline", "cat /proc/cmdline", "patched from outside"),
    ] {
        let module = fs::read(kernel.patch(file)?)?;
        for round in 0..ROUNDS {
            rest.apply(&module, TRANSITION_LIMIT)?;
            if round % 10 == 0 {
                let output = guest.sh(probe)?;
                ensure!(output.contains(sign), "{file} is not in force: {output}");
            }
            rest.revert(file, TRANSITION_LIMIT)?;
            if round % 10 == 0 {
                let output = guest.sh(probe)?;
                ensure!(!output.contains(sign), "{file} is still in force: {output}");
            }
        }
    }
    guest.sh(
        "killall hammer; while [ ! -e /tmp/hammer ]; do sleep 0.1; done
kill -9 $(grep -l '^sleep' /proc/[0-9]*/comm | sed 's/[^0-9]//g'); sleep 1",
    )?;
    let answers = guest.sh("cat /tmp/hammer")?;
    println!("{}", answers.lines().next().unwrap_or_default());
    ensure!(
        answers.contains(" wrong=0 "),
        "a system call returned a wrong result: {answers}"
    );
    Ok(())
}

/// Tasks that sleep in the function are named, keep their state, and switch when they have left it;
/// cancel, revert and force work too.
fn blocked(fixture: &Fixture, guest: &mut Guest) -> Result<()> {
    let patch = fixture.kernel(KEY)?.patch("pause")?;
    let outpatch = guest.outpatch().clone();
    guest.sh("sleeper 10 & sleep 1")?;
    ensure!(
        pausing(guest)? == "__do_sys_pause",
        "no task is in pause(2)"
    );

    let line = outpatch.refused(&["apply", patch, "--mode", "stop-machine"])?;
    ensure!(line.contains("__do_sys_pause+"), "{line}");
    apply_blocked(&outpatch, patch, "2")?;
    let line = outpatch.refused(&["signal", "pause"])?;
    ensure!(line.contains("CONFIG_LIVEPATCH"), "{line}");
    ensure!(pausing(guest)? == "__do_sys_pause", "a sleeper was woken");
    outpatch.ok(&["cancel", "pause"])?;
    ensure!(
        the_patch(&outpatch)?["phase"] == "reverted",
        "the patch is still there"
    );

    // The sleepers are killed, and nothing blocks any more. Tasks that are created meanwhile get
    // the new function.
    apply_blocked(&outpatch, patch, "2")?;
    guest.sh("sleeper 10 & sleep 1")?;
    let status = the_patch(&outpatch)?;
    let forked = list(&status, "/tasks")?
        .iter()
        .any(|task| task["switched_by"] == "forked");
    ensure!(forked, "no task was forked in the transition: {status}");
    kill_waiting(guest, &status)?;
    let completed = end_of_transition(&outpatch)?;
    ensure!(completed["phase"] == "applied", "{completed}");
    ensure!(
        pausing(guest)? != "__do_sys_pause",
        "a task is in the old function"
    );

    // Now tasks sleep in the new function, and block the revert.
    outpatch.call(&["revert", "pause", "--timeout", "1"])?;
    kill_waiting(guest, &the_patch(&outpatch)?)?;
    let completed = end_of_transition(&outpatch)?;
    ensure!(completed["phase"] == "reverted", "{completed}");

    guest.sh("sleeper 10 & sleep 1")?;
    apply_blocked(&outpatch, patch, "1")?;
    outpatch.ok(&["force", "pause"])?;
    let forced = the_patch(&outpatch)?;
    ensure!(
        forced["phase"] == "applied" && forced["force"] == true,
        "{forced}"
    );
    Ok(())
}

/// Applies the patch, which does not complete within the timeout: exactly the sleepers in the
/// function block it.
fn apply_blocked(outpatch: &Outpatch, patch: &str, timeout: &str) -> Result<()> {
    times_out(outpatch, &["apply", patch, "--timeout", timeout])?;
    blockers_wait(&the_patch(outpatch)?)
}

/// Kills all tasks that have not switched.
fn kill_waiting(guest: &mut Guest, status: &Value) -> Result<()> {
    let waiting = waiting(status)?;
    let pids: Vec<String> = waiting.iter().map(|task| task["pid"].to_string()).collect();
    if pids.is_empty() {
        return Ok(());
    }
    guest
        .sh(&format!("kill -9 {}", pids.join(" ")))
        .context("killing the tasks that have not switched")?;
    Ok(())
}
