//! How tasks move: all in one pause or each when it can, turned round on the way, or by force.

use anyhow::{Result, bail, ensure};
use guests::drive::{Guest, Outpatch};

use crate::harness::fixture::Fixture;
use crate::patching::blocked_tasks::{
    BLOCKERS, back_in_the_function, end_of_transition, list, pausing, states, stays_blocked,
    the_patch,
};

/// How often a guest that was left alone for a second is asked whether it is idle.
const LOOKS: usize = 50;

pub fn one_pause_cancel_and_force(
    fixture: &Fixture,
    guest: &mut Guest,
    generation: &str,
) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let (sample, pause) = (kernel.patch("livepatch-sample")?, kernel.patch("pause")?);
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    // The log just read is still on its way through the console's workers: let the guest be idle.
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

/// An idle guest is patched in one pause, and back. `other` is a patch that nobody is in the way of either.
fn in_one_pause(outpatch: &Outpatch, patch: &str, mode: &str, other: &str) -> Result<()> {
    for verb in [&["apply", patch][..], &["revert"]] {
        is_idle(outpatch, other)?;
        outpatch.ok(&[verb, &["--mode", mode]].concat())?;
        let status = outpatch.json(&["status", "livepatch_sample"])?;
        ensure!(status["pauses"]["count"] == 1, "{mode}: {status}");
        for task in list(&status, "/tasks")? {
            let way = task["switched_by"].as_str().unwrap_or_default();
            ensure!(["stack", "user-mode"].contains(&way), "{mode}: {task}");
        }
    }
    println!("{mode}: there and back in one pause each");
    Ok(())
}

/// Waits for the guest to be idle: on a busy machine its console's workers and timers are still at it a while later.
fn is_idle(outpatch: &Outpatch, patch: &str) -> Result<()> {
    for _ in 0..LOOKS {
        let report = outpatch.json(&["check", patch])?;
        if report["at_once"] == true {
            return Ok(());
        }
    }
    bail!("the guest is not idle in {LOOKS} looks")
}

/// With tasks in the old function all in one pause cannot be, and the first of them is named; nothing is left of the try. What
/// only prefers it goes on task by task.
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
        "it is left: {patches}"
    );
    ensure!(states(guest)?.iter().eq([&-1]), "states are left behind");

    let reply = outpatch.call(&["apply", patch, "--mode", "auto", "--timeout", "1"])?;
    ensure!(the_patch(outpatch)?["transition"] == true, "{reply:?}");
    outpatch.ok(&["cancel"])?;
    Ok(())
}

/// Turned round twice on the way, it still ends, with nobody in the wrong code.
fn cancelled(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    stays_blocked(guest, outpatch, patch)?;
    outpatch.ok(&["cancel"])?;
    ensure!(the_patch(outpatch)?["phase"] == "reverted", "not reverted");
    ensure!(states(guest)?.iter().eq([&-1]), "states are left behind");
    let line = outpatch.refused(&["cancel", "pause"])?;
    ensure!(line.contains("no patch named pause"), "{line}");

    // Held on the way back by those who sleep in the new function.
    outpatch.ok(&["apply", patch, "--signal-after", "0"])?;
    outpatch.call(&["revert", "pause", "--no-wait"])?;
    if the_patch(outpatch)?["transition"] == true {
        // Those who have moved already may sleep in the old function again.
        outpatch.call(&["cancel", "pause", "--no-wait"])?;
        outpatch.call(&["signal", "pause"])?;
    }
    let ended = end_of_transition(outpatch)?;
    if ended["phase"] == "applied" {
        outpatch.ok(&["revert", "pause", "--timeout", "60"])?;
    }
    ensure!(states(guest)?.iter().eq([&-1]), "states are left behind");
    back_in_the_function(guest)
}

/// Force moves those in the way as they are, says so for ever, and leaves the code.
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
    ensure!(states(guest)?.iter().eq([&-1]), "states are left behind");
    ensure!(pausing(guest)? == "__do_sys_pause", "it was woken");
    outpatch.ok(&["revert", "pause"])?;
    let status = the_patch(outpatch)?;
    ensure!(
        status["force"] == true && status["phase"] == "reverted",
        "{status}"
    );
    // The same again finds another place.
    outpatch.ok(&["apply", patch, "--signal-after", "0", "--timeout", "30"])?;
    outpatch.ok(&["revert", "pause", "--signal-after", "0"])?;
    Ok(())
}
