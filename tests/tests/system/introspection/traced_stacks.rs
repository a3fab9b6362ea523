//! The stacks of tasks that sleep in functions whose return addresses a kretprobe or the function
//! graph tracer has replaced.
//!
//! They are compared with what the guest lists of tasks that sleep in the same way while nothing is
//! traced: a kernel does not recover all of these addresses in its own listing. 5.10 recovers none
//! of kretprobes, and others stop where a kretprobe's record holds the graph tracer's trampoline.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;
use tests::task_listing::{self, symbols};

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// Changes to the folder of the files that control ftrace.
const TRACING: &str = "cd /sys/kernel/tracing";
/// Functions that the processes of `sleeper` sleep in.
const INNER: &str = "do_nanosleep vfs_read do_sys_poll do_futex";
/// More of them; some call those.
const OUTER: &str = "hrtimer_nanosleep ksys_read core_sys_select kernel_wait4 __do_sys_pause";
/// As [`task_listing::COMMAND`], of the tasks of `sleeper` only.
const LISTING: &str = "for t in $(grep -l '^sleep-' /proc/[0-9]*/task/[0-9]*/comm); do \
    t=${t%/comm}; echo \"T ${t##*/} $(cat $t/comm)\"; cat $t/stack; done";
/// Turning tracers on and off takes an emulated guest on a busy host long: each kretprobe and each
/// change of a filter waits for all CPUs several times.
const LIMIT: Duration = Duration::from_secs(180);
const SCENARIO_LIMIT: Duration = Duration::from_secs(1200);
/// The number of processes, and the least number of their stacks that must be compared: each
/// process has one or two tasks.
const SLEEPERS: usize = 20;

/// How the return addresses are replaced.
#[derive(Clone, Copy, Debug)]
enum Tracers {
    Kretprobes,
    Graph,
    /// Both, of the same functions.
    Both,
    /// Kretprobes of the inner functions, and the graph tracer of the outer ones.
    Each,
}

impl Tracers {
    const ALL: [Tracers; 4] = [
        Tracers::Kretprobes,
        Tracers::Graph,
        Tracers::Both,
        Tracers::Each,
    ];

    /// The functions that have a kretprobe, and those that the graph tracer traces.
    fn functions(self) -> (Vec<&'static str>, Vec<&'static str>) {
        match self {
            Tracers::Kretprobes => (vec![INNER, OUTER], vec![]),
            Tracers::Graph => (vec![], vec![INNER, OUTER]),
            Tracers::Both => (vec![INNER, OUTER], vec![INNER, OUTER]),
            Tracers::Each => (vec![INNER], vec![OUTER]),
        }
    }
}

/// The frames that tasks of each name may have.
type Expected = BTreeMap<String, BTreeSet<Vec<String>>>;

pub fn scenarios() -> Vec<Scenario> {
    ["5.10", "6.1", "6.12", "7.2", "7.3"]
        .map(|generation| {
            let name = format!("traced_stacks::recovered_{generation}");
            // The oldest and the newest form of the records.
            let extra = !["5.10", "7.3"].contains(&generation);
            Scenario::new(name, move |fixture| recovered(fixture, generation))
                .extra_if(extra)
                .limit(SCENARIO_LIMIT)
        })
        .into()
}

fn recovered(fixture: &Fixture, generation: &str) -> Result<()> {
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        let log = guest.dmesg()?;
        let (compared, as_listed) = equal_in(guest, generation)?;
        println!(
            "{generation}: {compared} stacks equal; the guest lists {as_listed} of them whole"
        );
        guest.expect_unharmed(&log)
    })
}

/// Checks the frames of each sleeper with each tracer and with both, while they
/// are on and after they were turned off: the return addresses stay replaced. Returns how many stacks
/// were compared, and how many of them the guest lists with the same frames.
fn equal_in(guest: &mut Guest, generation: &str) -> Result<(usize, usize)> {
    sleep(guest)?;
    let mut expected = Expected::new();
    for (comm, frames) in listed(guest)?.into_values() {
        expected.entry(comm).or_default().insert(frames);
    }
    kill(guest)?;
    let mut total = (0, 0);
    for tracers in Tracers::ALL {
        turn_on(guest, tracers)?;
        sleep(guest)?;
        let on = compare(guest, generation, tracers, &expected)?;
        turn_off(guest)?;
        let off = compare(guest, generation, tracers, &expected)?;
        println!("{generation}, {tracers:?}: {on:?} stacks equal, and then {off:?}");
        total = (total.0 + on.0 + off.0, total.1 + on.1 + off.1);
        kill(guest)?;
    }
    Ok(total)
}

fn sleep(guest: &mut Guest) -> Result<()> {
    guest.sh(&format!("sleeper {SLEEPERS} & sleep 2"))?;
    Ok(())
}

/// Kills the processes of `sleeper`, and waits until they are gone.
pub fn kill(guest: &mut Guest) -> Result<()> {
    guest.sh("killall sleeper; while grep -q '^sleep-' /proc/[0-9]*/comm; do sleep 0.1; done")?;
    Ok(())
}

/// Puts `sleeper` to sleep in functions with replaced return addresses, some by a kretprobe, some by
/// the graph tracer. The tracers are then off: that does not restore the addresses.
pub fn put_to_sleep(guest: &mut Guest) -> Result<()> {
    turn_on(guest, Tracers::Each)?;
    sleep(guest)?;
    turn_off(guest)
}

fn turn_on(guest: &mut Guest, tracers: Tracers) -> Result<()> {
    let (probed, graphed) = tracers.functions();
    let (probed, graphed) = (probed.join(" "), graphed.join(" "));
    if !probed.is_empty() {
        guest.sh_within(
            &format!(
                "{TRACING}; for f in {probed}; do echo \"r:outpatch/$f $f\"; done \
                 > kprobe_events; echo 1 > events/outpatch/enable"
            ),
            LIMIT,
        )?;
    }
    if !graphed.is_empty() {
        guest.sh_within(
            &format!(
                "{TRACING}; echo {graphed} > set_ftrace_filter; \
                 echo function_graph > current_tracer"
            ),
            LIMIT,
        )?;
    }
    Ok(())
}

/// A tracer that is on when its filter is emptied would trace all functions for a moment.
fn turn_off(guest: &mut Guest) -> Result<()> {
    guest.sh_within(
        &format!(
            "{TRACING}; [ ! -e events/outpatch ] || echo 0 > events/outpatch/enable; \
             echo > kprobe_events; echo nop > current_tracer; echo > set_ftrace_filter"
        ),
        LIMIT,
    )?;
    Ok(())
}

/// The guest's own listing of the tasks of `sleeper`.
fn listed(guest: &mut Guest) -> Result<task_listing::Stacks> {
    task_listing::parse(&guest.sh_within(LISTING, LIMIT)?)
}

/// Compares the stack of each task of `sleeper`. Returns how many are equal, and how many of them are
/// in the guest's listing.
fn compare(
    guest: &mut Guest,
    generation: &str,
    tracers: Tracers,
    expected: &Expected,
) -> Result<(usize, usize)> {
    let listed = listed(guest)?;
    let stacks = guest.outpatch().json(&["stack"])?;
    let stacks = stacks.as_array().context("stack is no list")?;
    let mut as_listed = 0;
    for (pid, (comm, frames)) in &listed {
        let stack = stacks.iter().find(|stack| stack["task"]["pid"] == *pid);
        let stack = stack.with_context(|| format!("{pid} {comm} has no stack"))?;
        let read = symbols(stack)?;
        let expected = expected.get(comm).with_context(|| comm.clone())?;
        ensure!(
            stack["reliable"] == true && expected.contains(&read),
            "{generation}, {tracers:?}: {pid} {comm}: {}\noutpatch {read:?}\nguest    {frames:?}\n\
             expected {expected:?}",
            stack["reason"]
        );
        as_listed += usize::from(read == *frames);
    }
    let compared = listed.len();
    ensure!(compared >= SLEEPERS, "only {compared} stacks compared");
    Ok((compared, as_listed))
}
