//! A transition that cannot end at once: tasks sleep in the patched function, are named, and move when they leave it.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;

use crate::harness::fixture::Fixture;

/// Those of `sleeper`'s processes that are in pause(2).
pub const BLOCKERS: [&str; 3] = ["sleep-pause", "sleep-thread", "sleep-waited"];
/// Exit status of the command line when the transition goes on.
const TIMED_OUT: i32 = 4;
/// How long a transition that nothing blocks any more may take.
const SOON: Duration = Duration::from_secs(30);

pub fn sleepers_in_the_function(
    fixture: &Fixture,
    guest: &mut Guest,
    generation: &str,
) -> Result<()> {
    let patch = fixture.kernel(generation)?.patch("pause")?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    guest.sh("sleeper 10 & sleep 1")?;
    ensure!(
        pausing(guest)? == "__do_sys_pause",
        "sleep-pause does not sleep in pause(2)"
    );

    stays_blocked(guest, &outpatch, patch)?;
    // The other way there is nothing in the way: those who have not moved need not move back.
    outpatch.ok(&["revert", "pause"])?;
    ensure!(
        states(guest)? == BTreeSet::from([-1]),
        "states are left behind"
    );
    ensure!(
        pausing(guest)? == "__do_sys_pause",
        "a task was moved while it slept in the function"
    );

    stays_blocked(guest, &outpatch, patch)?;
    // Stopping wakes them, and what they stop in is the way back to user mode.
    let each = BLOCKERS.join("|");
    let pids = format!(
        "$(grep -lE '^({each})$' /proc/[0-9]*/task/[0-9]*/comm | sed 's/.comm//;s/.*.task.//')"
    );
    guest.sh(&format!(
        "for p in {pids}; do kill -STOP $p; kill -CONT $p; done"
    ))?;
    let ended = end_of_transition(&outpatch)?;
    for task in list(&ended, "/tasks")? {
        let comm = task["comm"].as_str().unwrap_or_default();
        if BLOCKERS.contains(&comm) {
            ensure!(has_left(task), "{task}");
        }
    }
    all_moved(guest)?;

    // They never are in the new function for long.
    outpatch.ok(&["revert", "pause"])?;
    back_in_the_function(guest)?;
    signalled(guest, &outpatch, patch)?;
    guest.expect_unharmed(&log)
}

/// The fake signal moves those who sleep in the function: nothing is pending, nobody dies, and nobody else is signalled.
fn signalled(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    let sleepers = "grep -l '^sleep-' /proc/[0-9]*/task/[0-9]*/comm";
    let before = guest.sh(sleepers)?;
    stays_blocked(guest, outpatch, patch)?;
    outpatch.ok(&["signal"])?;
    let ended = end_of_transition(outpatch)?;
    for task in list(&ended, "/tasks")? {
        let blocked = BLOCKERS.contains(&task["comm"].as_str().unwrap_or_default());
        let signals = task["signals"].as_u64().context("no signals")?;
        ensure!((signals > 0) == blocked, "{task}");
        ensure!(!blocked || has_left(task), "{task}");
    }
    all_moved(guest)?;
    let pending =
        guest.sh("grep -hE '^(SigPnd|ShdPnd)' /proc/[0-9]*/task/[0-9]*/status | sort -u")?;
    ensure!(
        pending == "ShdPnd:\t0000000000000000\nSigPnd:\t0000000000000000",
        "signals are pending: {pending}"
    );
    ensure!(guest.sh(sleepers)? == before, "a sleeper is gone");
    println!("signalled: {} ms", ended["transition_ms"]);

    outpatch.ok(&["revert", "pause", "--signal-after", "0"])?;
    back_in_the_function(guest)?;
    outpatch.ok(&["apply", patch, "--signal-after", "0.2", "--timeout", "30"])?;
    outpatch.ok(&["revert", "pause", "--signal-after", "0.2"])?;
    ensure!(guest.sh(sleepers)? == before, "a sleeper is gone");
    Ok(())
}

/// It came by the boundary, or a pause met it on the way there, out of the function already.
fn has_left(task: &Value) -> bool {
    task["switched_by"] == "kernel-exit" || task["switched_by"] == "stack"
}

/// Nobody has a state any more, and the sleeper is not in the old function.
fn all_moved(guest: &mut Guest) -> Result<()> {
    ensure!(
        states(guest)? == BTreeSet::from([-1]),
        "states are left behind"
    );
    ensure!(
        pausing(guest)? != "__do_sys_pause",
        "a task went back to the old function"
    );
    Ok(())
}

/// Applies the patch, and sees who is in its way: named by the command line, by the status with the frame, and by the guest itself.
pub fn stays_blocked(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    let reply = outpatch.call(&["apply", patch, "--timeout", "2"])?;
    ensure!(reply.status == Some(TIMED_OUT), "{reply:?}");
    let status = the_patch(outpatch)?;
    ensure!(status["transition"] == true, "{status}");
    let waiting: Vec<&Value> = list(&status, "/tasks")?
        .iter()
        .filter(|task| task["switched_by"].is_null())
        .collect();
    let names: BTreeSet<&str> = waiting
        .iter()
        .filter_map(|task| task["comm"].as_str())
        .collect();
    ensure!(names == BTreeSet::from(BLOCKERS), "these wait: {names:?}");
    for task in waiting {
        let (comm, blocker) = (
            task["comm"].as_str().unwrap_or_default(),
            task["blocker"].as_str().unwrap_or_default(),
        );
        ensure!(
            blocker.contains("__do_sys_pause+"),
            "the frame is not named: {task}"
        );
        ensure!(
            reply.stderr.contains(comm),
            "{comm} is not in {:?}",
            reply.stderr
        );
        let state = guest.sh(&format!("cat /proc/{}/patch_state", task["pid"]))?;
        ensure!(state == "0", "{comm} has patch state {state}");
    }
    // A child of a task that has moved is born there.
    let born = guest.sh("cat /proc/self/patch_state /proc/$$/patch_state")?;
    ensure!(
        born == "1\n1",
        "the shell and its child have patch states {born:?}"
    );
    Ok(())
}

pub fn end_of_transition(outpatch: &Outpatch) -> Result<Value> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        let status = the_patch(outpatch)?;
        if status["transition"] == false {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("the transition does not end: {}", the_patch(outpatch)?)
}

pub fn the_patch(outpatch: &Outpatch) -> Result<Value> {
    outpatch.json(&["status", "pause"])
}

pub fn list<'v>(value: &'v Value, at: &str) -> Result<&'v Vec<Value>> {
    value
        .pointer(at)
        .and_then(Value::as_array)
        .with_context(|| format!("no {at} in {value}"))
}

/// The patch states of all threads.
pub fn states(guest: &mut Guest) -> Result<BTreeSet<i64>> {
    let text = guest.sh("cat /proc/[0-9]*/task/[0-9]*/patch_state 2>/dev/null || true")?;
    text.lines().map(|line| Ok(line.parse()?)).collect()
}

/// Waits until the old function is what sleep-pause sleeps in: it left the new one when the patch went, and comes back by itself.
pub fn back_in_the_function(guest: &mut Guest) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while pausing(guest)? != "__do_sys_pause" {
        ensure!(Instant::now() < deadline, "the new function is still there");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The function that sleep-pause sleeps in, as the guest's own unwinder sees it: which it does once the task is off its CPU, and a
/// task that has just been moved may still be on its way to sleep.
pub fn pausing(guest: &mut Guest) -> Result<String> {
    let stack = guest.sh("p=$(grep -l '^sleep-pause$' /proc/[0-9]*/comm | head -1)
for n in $(seq 100); do s=$(head -1 ${p%comm}stack); [ -n \"$s\" ] && break; sleep 0.1; done
echo \"$s\"")?;
    let frame = stack
        .strip_prefix("[<0>] ")
        .with_context(|| format!("no frame: {stack:?}"))?;
    Ok(frame.split('+').next().unwrap_or_default().to_owned())
}
