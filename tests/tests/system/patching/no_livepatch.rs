//! A guest whose kernel has no `CONFIG_LIVEPATCH`: nothing in it knows of patch states, and a TIF_PATCH_PENDING would send its exit to
//! user mode round for ever. Who has moved is our own book, in hidden memory.
//!
//! Debian has no such kernel: a small one is built from its source, which takes some minutes the first time, so this runs when
//! `OUTPATCH_TEST_NO_LIVEPATCH` is in the environment.

use std::{collections::BTreeSet, env, fs};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};
use guests::kernel::{Generation, no_livepatch};
use serde_json::Value;

use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::apply_revert::TRANSITION_LIMIT;
use crate::patching::blocked_tasks::{BLOCKERS, end_of_transition, list, pausing, the_patch};

/// What asks for it.
const VARIABLE: &str = "OUTPATCH_TEST_NO_LIVEPATCH";
/// The name under which the fixture has the kernel.
const KEY: &str = "no-livepatch";
/// On and off, under load.
const ROUNDS: u32 = 50;
/// Exit status of the command line when the transition goes on.
const TIMED_OUT: i32 = 4;

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
            in_the_way(fixture, guest)?;
            println!("without CONFIG_LIVEPATCH, {cpus} vCPUs: all moved as they should");
            guest.expect_unharmed(&log)
        })?;
    }
    Ok(())
}

/// The kernel is what it is meant to be.
fn it_has_none(guest: &mut Guest) -> Result<()> {
    let seen =
        guest.sh("ls -d /sys/kernel/livepatch /proc/self/patch_state 2>/dev/null || true")?;
    ensure!(seen.is_empty(), "the guest has livepatching: {seen}");
    let tasks = guest.outpatch().json(&["ps"])?;
    let mut states = list(&tasks, "")?.iter().map(|task| &task["patch_state"]);
    ensure!(states.all(Value::is_null), "{tasks}");
    Ok(())
}

/// A system call that is hammered changes its answer, and no call gets a wrong one.
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
                let seen = guest.sh(probe)?;
                ensure!(seen.contains(sign), "{file} is not there: {seen}");
            }
            rest.revert(file, TRANSITION_LIMIT)?;
            if round % 10 == 0 {
                let seen = guest.sh(probe)?;
                ensure!(!seen.contains(sign), "{file} is still there: {seen}");
            }
        }
    }
    guest.sh("killall hammer; while [ ! -e /tmp/hammer ]; do sleep 0.1; done; kill_sleepers() { kill -9 $(grep -l '^sleep' /proc/[0-9]*/comm | sed 's/[^0-9]//g'); }; kill_sleepers; sleep 1")?;
    let answers = guest.sh("cat /tmp/hammer")?;
    println!("{}", answers.lines().next().unwrap_or_default());
    ensure!(
        answers.contains(" wrong=0 "),
        "a system call answered wrongly: {answers}"
    );
    Ok(())
}

/// Those who sleep in the function are named, stay, and move when they have left it; the three other ways out work too.
fn in_the_way(fixture: &Fixture, guest: &mut Guest) -> Result<()> {
    let patch = fixture.kernel(KEY)?.patch("pause")?;
    let outpatch = guest.outpatch().clone();
    guest.sh("sleeper 10 & sleep 1")?;
    ensure!(pausing(guest)? == "__do_sys_pause", "nobody is in pause(2)");

    let line = outpatch.refused(&["apply", patch, "--mode", "stop-machine"])?;
    ensure!(line.contains("__do_sys_pause+"), "{line}");
    waits_for(&outpatch, &["apply", patch, "--timeout", "2"])?;
    let line = outpatch.refused(&["signal", "pause"])?;
    ensure!(line.contains("CONFIG_LIVEPATCH"), "{line}");
    ensure!(pausing(guest)? == "__do_sys_pause", "a sleeper was moved");
    outpatch.ok(&["cancel", "pause"])?;
    ensure!(
        the_patch(&outpatch)?["phase"] == "reverted",
        "it is still there"
    );

    // They go, and nobody is left in the way. Whoever comes meanwhile gets the new function.
    waits_for(&outpatch, &["apply", patch, "--timeout", "2"])?;
    guest.sh("sleeper 10 & sleep 1")?;
    let status = the_patch(&outpatch)?;
    let born = list(&status, "/tasks")?
        .iter()
        .any(|task| task["switched_by"] == "forked");
    ensure!(born, "nobody was born there: {status}");
    kill_those_that_wait(guest, &status)?;
    let ended = end_of_transition(&outpatch)?;
    ensure!(ended["phase"] == "applied", "{ended}");
    ensure!(
        pausing(guest)? != "__do_sys_pause",
        "somebody is in the old function"
    );

    // Now they sleep in the new one, and are in the way back.
    outpatch.call(&["revert", "pause", "--timeout", "1"])?;
    kill_those_that_wait(guest, &the_patch(&outpatch)?)?;
    let ended = end_of_transition(&outpatch)?;
    ensure!(ended["phase"] == "reverted", "{ended}");

    guest.sh("sleeper 10 & sleep 1")?;
    waits_for(&outpatch, &["apply", patch, "--timeout", "1"])?;
    outpatch.ok(&["force", "pause"])?;
    let forced = the_patch(&outpatch)?;
    ensure!(
        forced["phase"] == "applied" && forced["force"] == true,
        "{forced}"
    );
    Ok(())
}

/// The transition goes on when the time is over, and exactly the sleepers in the function are named.
fn waits_for(outpatch: &Outpatch, words: &[&str]) -> Result<()> {
    let reply = outpatch.call(words)?;
    ensure!(reply.status == Some(TIMED_OUT), "{reply:?}");
    let status = the_patch(outpatch)?;
    let waiting = list(&status, "/tasks")?
        .iter()
        .filter(|task| task["switched_by"].is_null());
    let mut names = BTreeSet::new();
    for task in waiting {
        let blocker = task["blocker"].as_str().unwrap_or_default();
        ensure!(blocker.contains("__do_sys_pause+"), "{task}");
        names.insert(task["comm"].as_str().unwrap_or_default());
    }
    ensure!(names == BTreeSet::from(BLOCKERS), "these wait: {names:?}");
    Ok(())
}

fn kill_those_that_wait(guest: &mut Guest, status: &Value) -> Result<()> {
    let waiting = list(status, "/tasks")?
        .iter()
        .filter(|task| task["switched_by"].is_null());
    let pids: Vec<String> = waiting.map(|task| task["pid"].to_string()).collect();
    if pids.is_empty() {
        return Ok(());
    }
    guest
        .sh(&format!("kill -9 {}", pids.join(" ")))
        .context("killing those that wait")?;
    Ok(())
}
