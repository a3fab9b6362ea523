//! A transition that cannot complete at once: tasks sleep in the patched function, are named with
//! the frame that blocks them, and switch when they leave the function.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;

use crate::harness::fixture::Fixture;

/// The processes of `sleeper` that are in pause(2).
pub const BLOCKERS: [&str; 3] = ["sleep-pause", "sleep-thread", "sleep-waited"];
/// The exit status of the command line when it stops waiting for a transition.
pub const TIMED_OUT: i32 = 4;
/// How long a transition may take once nothing blocks it.
const UNBLOCKED_LIMIT: Duration = Duration::from_secs(30);

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
    // Nothing blocks the reversed transition: tasks that have not switched need not switch back.
    outpatch.ok(&["revert", "pause"])?;
    ensure!(
        states(guest)? == BTreeSet::from([-1]),
        "tasks still have a patch state"
    );
    ensure!(
        pausing(guest)? == "__do_sys_pause",
        "a task was woken while it slept in the function"
    );

    stays_blocked(guest, &outpatch, patch)?;
    // Stopping wakes them, and they stop on exit to user mode.
    let each = BLOCKERS.join("|");
    let pids = format!(
        "$(grep -lE '^({each})$' /proc/[0-9]*/task/[0-9]*/comm | sed 's/.comm//;s/.*.task.//')"
    );
    guest.sh(&format!(
        "for p in {pids}; do kill -STOP $p; kill -CONT $p; done"
    ))?;
    let completed = end_of_transition(&outpatch)?;
    for task in list(&completed, "/tasks")? {
        let comm = task["comm"].as_str().unwrap_or_default();
        if BLOCKERS.contains(&comm) {
            ensure!(has_left(task), "{task}");
        }
    }
    all_switched(guest)?;

    // They never stay in the new function for long.
    outpatch.ok(&["revert", "pause"])?;
    back_in_the_function(guest)?;
    signalled(guest, &outpatch, patch)?;
    guest.expect_unharmed(&log)
}

/// The fake signal makes tasks that sleep in the function switch: no signal is pending afterwards,
/// no task dies, and no other task is signalled.
fn signalled(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    let sleepers = "grep -l '^sleep-' /proc/[0-9]*/task/[0-9]*/comm";
    let before = guest.sh(sleepers)?;
    stays_blocked(guest, outpatch, patch)?;
    outpatch.ok(&["signal"])?;
    let completed = end_of_transition(outpatch)?;
    for task in list(&completed, "/tasks")? {
        let blocked = BLOCKERS.contains(&task["comm"].as_str().unwrap_or_default());
        let signals = task["signals"].as_u64().context("no signals")?;
        ensure!((signals > 0) == blocked, "{task}");
        ensure!(!blocked || has_left(task), "{task}");
    }
    all_switched(guest)?;
    let pending =
        guest.sh("grep -hE '^(SigPnd|ShdPnd)' /proc/[0-9]*/task/[0-9]*/status | sort -u")?;
    ensure!(
        pending == "ShdPnd:\t0000000000000000\nSigPnd:\t0000000000000000",
        "signals are pending: {pending}"
    );
    ensure!(guest.sh(sleepers)? == before, "a sleeper is gone");
    println!("signalled: {} ms", completed["transition_ms"]);

    outpatch.ok(&["revert", "pause", "--signal-after", "0"])?;
    back_in_the_function(guest)?;
    outpatch.ok(&["apply", patch, "--signal-after", "0.2", "--timeout", "30"])?;
    outpatch.ok(&["revert", "pause", "--signal-after", "0.2"])?;
    ensure!(guest.sh(sleepers)? == before, "a sleeper is gone");
    Ok(())
}

/// Whether the task switched on exit to user mode, or in a pause in which it was on its way there
/// and had left the function already.
pub fn has_left(task: &Value) -> bool {
    task["switched_by"] == "kernel-exit" || task["switched_by"] == "stack"
}

/// Checks that no task has a patch state any more, and that the sleeper is not in the old function.
fn all_switched(guest: &mut Guest) -> Result<()> {
    ensure!(
        states(guest)? == BTreeSet::from([-1]),
        "tasks still have a patch state"
    );
    ensure!(
        pausing(guest)? != "__do_sys_pause",
        "a task went back to the old function"
    );
    Ok(())
}

/// Applies the patch, and checks which tasks block it: as named by the command line, by the status
/// with the frame, and by the guest itself.
pub fn stays_blocked(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    let errors = times_out(outpatch, &["apply", patch, "--timeout", "2"])?;
    let status = the_patch(outpatch)?;
    ensure!(status["transition"] == true, "{status}");
    blockers_wait(&status)?;
    for task in waiting(&status)? {
        let comm = task["comm"].as_str().unwrap_or_default();
        ensure!(errors.contains(comm), "{comm} is not in {errors:?}");
        let state = guest.sh(&format!("cat /proc/{}/patch_state", task["pid"]))?;
        ensure!(state == "0", "{comm} has patch state {state}");
    }
    // A child of a task that has switched has the same patch state.
    let states = guest.sh("cat /proc/self/patch_state /proc/$$/patch_state")?;
    ensure!(
        states == "1\n1",
        "the shell and its child have patch states {states:?}"
    );
    Ok(())
}

/// Makes a call that stops waiting for its transition; returns what it printed on standard error.
pub fn times_out(outpatch: &Outpatch, arguments: &[&str]) -> Result<String> {
    let reply = outpatch.call(arguments)?;
    ensure!(reply.status == Some(TIMED_OUT), "{reply:?}");
    Ok(reply.stderr)
}

/// Checks that exactly the sleepers in the function wait, each with the frame that blocks it.
pub fn blockers_wait(status: &Value) -> Result<()> {
    let mut names = BTreeSet::new();
    for task in waiting(status)? {
        let blocker = task["blocker"].as_str().unwrap_or_default();
        ensure!(
            blocker.contains("__do_sys_pause+"),
            "the frame is not named: {task}"
        );
        names.insert(task["comm"].as_str().unwrap_or_default());
    }
    ensure!(names == BTreeSet::from(BLOCKERS), "these wait: {names:?}");
    Ok(())
}

/// The tasks in a report that have not switched.
pub fn waiting(report: &Value) -> Result<Vec<&Value>> {
    let tasks = list(report, "/tasks")?.iter();
    Ok(tasks.filter(|task| task["switched_by"].is_null()).collect())
}

/// Waits until the transition has completed; returns the patch's status then.
pub fn end_of_transition(outpatch: &Outpatch) -> Result<Value> {
    let deadline = Instant::now() + UNBLOCKED_LIMIT;
    while Instant::now() < deadline {
        let status = the_patch(outpatch)?;
        if status["transition"] == false {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("the transition does not complete: {}", the_patch(outpatch)?)
}

/// The status of the patch of pause(2).
pub fn the_patch(outpatch: &Outpatch) -> Result<Value> {
    outpatch.json(&["status", "pause"])
}

/// The list at the JSON pointer `at`.
pub fn list<'v>(value: &'v Value, at: &str) -> Result<&'v Vec<Value>> {
    value
        .pointer(at)
        .and_then(Value::as_array)
        .with_context(|| format!("no {at} in {value}"))
}

/// The patch states of all threads, as the guest shows them.
pub fn states(guest: &mut Guest) -> Result<BTreeSet<i64>> {
    let text = guest.sh("cat /proc/[0-9]*/task/[0-9]*/patch_state 2>/dev/null || true")?;
    text.lines().map(|line| Ok(line.parse()?)).collect()
}

/// Waits until sleep-pause sleeps in the old function: it left the new one when the patch was
/// reverted, and returns to the old one by itself.
pub fn back_in_the_function(guest: &mut Guest) -> Result<()> {
    let deadline = Instant::now() + UNBLOCKED_LIMIT;
    while pausing(guest)? != "__do_sys_pause" {
        ensure!(Instant::now() < deadline, "the new function is still there");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The function that sleep-pause sleeps in, by the guest's own unwinder. That shows a stack once
/// the task is off its CPU, and a task that has just switched may be about to sleep.
pub fn pausing(guest: &mut Guest) -> Result<String> {
    let stack = guest.sh("p=$(grep -l '^sleep-pause$' /proc/[0-9]*/comm | head -1)
for n in $(seq 100); do s=$(head -1 ${p%comm}stack); [ -n \"$s\" ] && break; sleep 0.1; done
echo \"$s\"")?;
    let frame = stack
        .strip_prefix("[<0>] ")
        .with_context(|| format!("no frame: {stack:?}"))?;
    Ok(frame.split('+').next().unwrap_or_default().to_owned())
}
