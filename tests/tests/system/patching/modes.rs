//! How tasks switch: all in one pause or each when it can; in a transition that is reversed while
//! it runs; by force.

use anyhow::{Result, bail, ensure};
use guests::drive::{Guest, Outpatch};

use crate::harness::fixture::Fixture;
use crate::patching::blocked_tasks::{
    BLOCKERS, back_in_the_function, end_of_transition, list, pausing, states, stays_blocked,
    the_patch,
};

/// How often a guest that was left alone for a second is checked before it counts as not idle.
const IDLE_CHECKS: usize = 50;

pub fn one_pause_cancel_and_force(
    fixture: &Fixture,
    guest: &mut Guest,
    generation: &str,
) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let (sample, pause) = (kernel.patch("livepatch-sample")?, kernel.patch("pause")?);
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    // The console's workers are still printing the log that was just read: let the guest be idle.
    guest.sh("sleep 1")?;
    for mode in ["auto", "stop-machine"] {
        in_one_pause(&outpatch, sample, mode, pause)?;
    }
    guest.sh("sleeper 10 & sleep 1")?;
    refused_with_the_frame(guest, &outpatch, pause)?;
    cancelled(guest, &outpatch, pause)?;
    forced(guest, &outpatch, pause)?;
    guest.expect_unharmed(&log)
}

/// A patch is applied to an idle guest in one pause, and reverted in one. `other` is another patch
/// that no task blocks.
fn in_one_pause(outpatch: &Outpatch, patch: &str, mode: &str, other: &str) -> Result<()> {
    for verb in [&["apply", patch][..], &["revert"]] {
        wait_until_idle(outpatch, other)?;
        outpatch.ok(&[verb, &["--mode", mode]].concat())?;
        let status = outpatch.json(&["status", "livepatch_sample"])?;
        ensure!(status["pauses"]["count"] == 1, "{mode}: {status}");
        for task in list(&status, "/tasks")? {
            let switched_by = task["switched_by"].as_str().unwrap_or_default();
            let at_once = ["stack", "user-mode"].contains(&switched_by);
            ensure!(at_once, "{mode}: {task}");
        }
    }
    println!("{mode}: applied and reverted in one pause each");
    Ok(())
}

/// Waits for the guest to be idle: on a busy host its console's workers and timers run on for a
/// while.
fn wait_until_idle(outpatch: &Outpatch, patch: &str) -> Result<()> {
    for _ in 0..IDLE_CHECKS {
        let report = outpatch.json(&["check", patch])?;
        if report["at_once"] == true {
            return Ok(());
        }
    }
    bail!("the guest is not idle in {IDLE_CHECKS} checks")
}

/// With tasks in the old function, switching all in one pause is refused; a blocking task is named,
/// and nothing of the attempt is left. A mode that only prefers one pause continues per task.
fn refused_with_the_frame(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    let line = outpatch.refused(&["apply", patch, "--mode", "stop-machine"])?;
    ensure!(
        line.contains("__do_sys_pause+") && BLOCKERS.iter().any(|comm| line.contains(comm)),
        "{line}"
    );
    println!("{line}");
    let patches = outpatch.json(&["status"])?["patches"].clone();
    ensure!(
        !patches.to_string().contains("\"pause\""),
        "the patch is still there: {patches}"
    );
    no_states(guest)?;

    let reply = outpatch.call(&["apply", patch, "--mode", "auto", "--timeout", "1"])?;
    ensure!(the_patch(outpatch)?["transition"] == true, "{reply:?}");
    outpatch.ok(&["cancel"])?;
    Ok(())
}

fn no_states(guest: &mut Guest) -> Result<()> {
    let none = states(guest)?.iter().eq([&-1]);
    ensure!(none, "tasks still have a patch state");
    Ok(())
}

/// A transition that is reversed twice still completes, with no task in the wrong code.
fn cancelled(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    stays_blocked(guest, outpatch, patch)?;
    outpatch.ok(&["cancel"])?;
    ensure!(the_patch(outpatch)?["phase"] == "reverted", "not reverted");
    no_states(guest)?;
    let line = outpatch.refused(&["cancel", "pause"])?;
    ensure!(line.contains("no patch named pause"), "{line}");

    // The revert is blocked by tasks that sleep in the new function.
    outpatch.ok(&["apply", patch, "--signal-after", "0"])?;
    outpatch.call(&["revert", "pause", "--no-wait"])?;
    if the_patch(outpatch)?["transition"] == true {
        // Tasks that have switched already may sleep in the old function again.
        outpatch.call(&["cancel", "pause", "--no-wait"])?;
        outpatch.call(&["signal", "pause"])?;
    }
    let completed = end_of_transition(outpatch)?;
    if completed["phase"] == "applied" {
        outpatch.ok(&["revert", "pause", "--timeout", "60"])?;
    }
    no_states(guest)?;
    back_in_the_function(guest)
}

/// Force switches blocked tasks where they are; the status says so permanently, and the patch's
/// code stays in the guest.
fn forced(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    stays_blocked(guest, outpatch, patch)?;
    outpatch.ok(&["force"])?;
    let status = the_patch(outpatch)?;
    ensure!(
        status["force"] == true && status["phase"] == "applied",
        "{status}"
    );
    for task in list(&status, "/tasks")? {
        let blocked = BLOCKERS.contains(&task["comm"].as_str().unwrap_or_default());
        ensure!(blocked == (task["switched_by"] == "forced"), "{task}");
    }
    no_states(guest)?;
    ensure!(pausing(guest)? == "__do_sys_pause", "it was woken");
    outpatch.ok(&["revert", "pause"])?;
    let status = the_patch(outpatch)?;
    ensure!(
        status["force"] == true && status["phase"] == "reverted",
        "{status}"
    );
    // The same patch is applied at another address.
    outpatch.ok(&["apply", patch, "--signal-after", "0", "--timeout", "30"])?;
    outpatch.ok(&["revert", "pause", "--signal-after", "0"])?;
    Ok(())
}
