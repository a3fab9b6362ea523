//! Our view of a quiet guest against the guest's own: tasks, and every sleeping task's stack frame by frame.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;
use tests::task_listing::{self, guest_frames, is_named, symbols};

/// Listing them takes a guest seconds; an rt kernel with its slow console, on a busy machine, more than a minute.
const LISTING_LIMIT: Duration = Duration::from_secs(180);

/// At least this many stacks are compared on each kernel.
const ENOUGH: usize = 50;

/// In a guest with two vCPUs that has just booted, `/proc` lists the same threads under the same names, and each sleeper's frames are
/// those of `/proc/PID/stack`; how many stacks were compared.
pub fn equal_in(guest: &mut Guest) -> Result<usize> {
    let outpatch = guest.outpatch().clone();
    guest.sh("sleeper 24 & sleep 1")?;
    let theirs = task_listing::parse(&guest.sh_within(task_listing::COMMAND, LISTING_LIMIT)?)?;
    let ps = outpatch.json(&["ps"])?;
    let tasks = ps.as_array().context("ps is no list")?;
    // What the shell that lists /proc starts comes and goes, the shell itself is in another place meanwhile, and the kernel starts a
    // worker now and then: every thread that stays must be in ours too, and none may be there that is in neither of the guest's
    // lists, before and after; those that stay have the same stack.
    let ours: BTreeSet<i64> = tasks
        .iter()
        .filter_map(|task| task["pid"].as_i64())
        .filter(|pid| *pid != 0)
        .collect();
    let there = guest.sh("for t in /proc/[0-9]*/task/[0-9]*; do echo ${t##*/}; done")?;
    let there: BTreeSet<i64> = there.lines().filter_map(|pid| pid.parse().ok()).collect();
    let staying: BTreeSet<i64> = theirs
        .keys()
        .copied()
        .filter(|pid| there.contains(pid))
        .collect();
    ensure!(
        staying.is_subset(&ours),
        "not in ps: {:?}",
        staying.difference(&ours)
    );
    let known: BTreeSet<i64> = theirs.keys().copied().chain(there).collect();
    ensure!(
        ours.is_subset(&known),
        "only in ps: {:?}",
        ours.difference(&known)
    );
    let idle = tasks.iter().filter(|task| task["kind"] == "idle").count();
    ensure!(idle == 2, "{idle} idle tasks on 2 vCPUs");
    let stacks = outpatch.json(&["stack"])?;
    let stacks = stacks.as_array().context("stack is no list")?;
    let mut compared = 0;
    for (pid, (comm, frames)) in &theirs {
        let Some(task) = tasks.iter().find(|task| task["pid"].as_i64() == Some(*pid)) else {
            continue;
        };
        let ours = task["comm"].as_str().context("a task with no name")?;
        ensure!(is_named(ours, comm), "{pid} is {comm:?}, not {ours:?}");
        if task["vcpu"].is_number() || frames.is_empty() {
            continue;
        }
        let stack = stacks.iter().find(|stack| stack["task"]["pid"] == *pid);
        let same = match stack {
            Some(stack) if stack["reliable"] == true && symbols(stack)? == *frames => true,
            _ => same_stack(guest, *pid).with_context(|| format!("{pid} {comm}"))?,
        };
        compared += usize::from(same);
    }
    ensure!(compared >= ENOUGH, "only {compared} stacks compared");
    both_run(&outpatch, tasks)?;
    Ok(compared)
}

/// How often what moves is looked at again: a task, or a vCPU.
const MOVES: usize = 5;

/// Each of the two vCPUs runs one task. Only in the middle of a context switch, where nothing stays, is it not certain which one, and
/// `ps` names none: then it is asked again.
fn both_run(outpatch: &Outpatch, tasks: &[Value]) -> Result<()> {
    let mut asked = tasks.to_vec();
    for _ in 0..MOVES {
        let mut vcpus: Vec<u64> = asked
            .iter()
            .filter_map(|task| task["vcpu"].as_u64())
            .collect();
        vcpus.sort_unstable();
        match vcpus[..] {
            [0, 1] => return Ok(()),
            [] | [0] | [1] => println!("only the vCPUs {vcpus:?} are not in a switch"),
            _ => bail!("the vCPUs run these tasks' CPUs: {vcpus:?}"),
        }
        let ps = outpatch.json(&["ps"])?;
        asked = ps.as_array().context("ps is no list")?.clone();
    }
    bail!("a vCPU runs no task in {MOVES} lists one after the other")
}

/// Whether our stack of `pid` is reliable and equals the guest's, where the two differed a while ago: even in a quiet guest some kernel
/// threads wake up now and then. Both are asked again, and held against each other if the task did not run in between. False: it
/// ran each time.
fn same_stack(guest: &mut Guest, pid: i64) -> Result<bool> {
    let outpatch = guest.outpatch().clone();
    let ours = |outpatch: &Outpatch| -> Result<Vec<String>> {
        let stack = outpatch.json(&["stack", &pid.to_string()])?;
        ensure!(stack["reliable"] == true, "{stack}");
        symbols(&stack)
    };
    for _ in 0..MOVES {
        let switches = format!("grep ctxt_switches /proc/{pid}/status");
        let before = guest.sh(&switches)?;
        let theirs = guest_frames(&guest.sh(&format!("cat /proc/{pid}/stack"))?);
        let ours = ours(&outpatch)?;
        if guest.sh(&switches)? == before {
            ensure!(ours == theirs, "\nours  {ours:?}\nguest {theirs:?}");
            return Ok(true);
        }
    }
    println!("{pid} does not sleep for long enough");
    Ok(false)
}
