//! The tasks and stacks of an idle guest, as outpatch reads them and as the guest lists them
//! itself: every task, and every sleeping task's stack frame by frame.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;
use tests::task_listing::{self, guest_frames, is_named, symbols};

/// Listing all stacks takes a guest seconds; a guest with an rt kernel and its slow console, on a
/// busy host, more than a minute.
const LISTING_LIMIT: Duration = Duration::from_secs(180);

/// The minimum number of stacks that must be compared on each kernel.
const MIN_COMPARED: usize = 50;

/// Checks that in a guest with two vCPUs that has just booted, `/proc` lists the same threads under
/// the same names as `ps`, and that each sleeper's frames are those of `/proc/PID/stack`. Returns
/// how many stacks were compared.
pub fn equal_in(guest: &mut Guest) -> Result<usize> {
    let outpatch = guest.outpatch().clone();
    guest.sh("sleeper 24 & sleep 1")?;
    let listed = task_listing::parse(&guest.sh_within(task_listing::COMMAND, LISTING_LIMIT)?)?;
    let ps = outpatch.json(&["ps"])?;
    let tasks = ps.as_array().context("ps is no list")?;
    // Processes of the shell that lists /proc come and go, the shell itself changes its stack, and
    // the kernel starts a worker now and then. So every thread that is in both of the guest's
    // lists, before and after, must be in `ps` too, and every thread in `ps` must be in one of the
    // two.
    let in_ps: BTreeSet<i64> = tasks
        .iter()
        .filter_map(|task| task["pid"].as_i64())
        .filter(|pid| *pid != 0)
        .collect();
    let after = guest.sh("for t in /proc/[0-9]*/task/[0-9]*; do echo ${t##*/}; done")?;
    let after: BTreeSet<i64> = after.lines().filter_map(|pid| pid.parse().ok()).collect();
    let staying: BTreeSet<i64> = listed
        .keys()
        .copied()
        .filter(|pid| after.contains(pid))
        .collect();
    ensure!(
        staying.is_subset(&in_ps),
        "not in ps: {:?}",
        staying.difference(&in_ps)
    );
    let known: BTreeSet<i64> = listed.keys().copied().chain(after).collect();
    ensure!(
        in_ps.is_subset(&known),
        "only in ps: {:?}",
        in_ps.difference(&known)
    );
    let idle = tasks.iter().filter(|task| task["kind"] == "idle").count();
    ensure!(idle == 2, "{idle} idle tasks on 2 vCPUs");
    let stacks = outpatch.json(&["stack"])?;
    let stacks = stacks.as_array().context("stack is no list")?;
    let mut compared = 0;
    for (pid, (comm, frames)) in &listed {
        let Some(task) = tasks.iter().find(|task| task["pid"].as_i64() == Some(*pid)) else {
            continue;
        };
        let read = task["comm"].as_str().context("a task with no name")?;
        ensure!(is_named(read, comm), "{pid} is {comm:?}, not {read:?}");
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
    ensure!(compared >= MIN_COMPARED, "only {compared} stacks compared");
    both_run(&outpatch, tasks)?;
    Ok(compared)
}

/// How often a task or a vCPU that was changing is read before the test gives up.
const ATTEMPTS: usize = 5;

/// Checks that each of the two vCPUs runs one task. In the middle of a context switch it is not
/// certain which one, and `ps` names none: then `ps` is called again.
fn both_run(outpatch: &Outpatch, tasks: &[Value]) -> Result<()> {
    let mut listed = tasks.to_vec();
    for _ in 0..ATTEMPTS {
        let mut vcpus: Vec<u64> = listed
            .iter()
            .filter_map(|task| task["vcpu"].as_u64())
            .collect();
        vcpus.sort_unstable();
        match vcpus[..] {
            [0, 1] => return Ok(()),
            [] | [0] | [1] => println!("only the vCPUs {vcpus:?} are not in a context switch"),
            _ => bail!("the vCPUs run these tasks' CPUs: {vcpus:?}"),
        }
        let ps = outpatch.json(&["ps"])?;
        listed = ps.as_array().context("ps is no list")?.clone();
    }
    bail!("a vCPU runs no task in {ATTEMPTS} lists one after the other")
}

/// Whether the stack of `pid` is reliable and equals the guest's, after the two were different:
/// even in an idle guest some kernel threads wake up now and then. Both are read again, and
/// compared if the task did not run in between. False if it ran in each attempt.
fn same_stack(guest: &mut Guest, pid: i64) -> Result<bool> {
    let outpatch = guest.outpatch().clone();
    let read = |outpatch: &Outpatch| -> Result<Vec<String>> {
        let stack = outpatch.json(&["stack", &pid.to_string()])?;
        ensure!(stack["reliable"] == true, "{stack}");
        symbols(&stack)
    };
    for _ in 0..ATTEMPTS {
        let switches = format!("grep ctxt_switches /proc/{pid}/status");
        let before = guest.sh(&switches)?;
        let listed = guest_frames(&guest.sh(&format!("cat /proc/{pid}/stack"))?);
        let read = read(&outpatch)?;
        if guest.sh(&switches)? == before {
            ensure!(read == listed, "\noutpatch {read:?}\nguest    {listed:?}");
            return Ok(true);
        }
    }
    println!("{pid} does not sleep for long enough");
    Ok(false)
}
