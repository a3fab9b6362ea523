//! The VMM: console, pause and resume, and the exit status of each way in which a guest ends.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

pub fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = [("6.1", 1), ("6.12", 8)]
        .map(|(generation, cpus)| {
            Scenario::new(
                format!("machine::console_and_cpus_{generation}_{cpus}"),
                move |fixture| console_and_cpus(fixture, generation, cpus),
            )
            .extra_if(cpus == 1)
        })
        .into();
    all.push(Scenario::new(
        "machine::each_end_has_its_status",
        exit_statuses,
    ));
    all
}

/// Every vCPU is online, and long output both ways arrives whole.
fn console_and_cpus(fixture: &Fixture, generation: &str, cpus: u32) -> Result<()> {
    fixture.with(fixture.boot(generation, cpus, "")?, |guest| {
        ensure!(
            guest.sh("nproc")? == cpus.to_string(),
            "not all vCPUs are online"
        );
        let lines = guest.sh(
            "i=0; while [ $i -lt 500 ]; do echo line-$i-of-the-long-output; i=$((i+1)); done",
        )?;
        for (number, line) in lines.lines().enumerate() {
            ensure!(
                line == format!("line-{number}-of-the-long-output"),
                "line {number} arrived as {line:?}"
            );
        }
        ensure!(
            lines.lines().count() == 500,
            "{} of 500 lines arrived",
            lines.lines().count()
        );
        // Around the number of bytes after which a guest's driver polls again, and its multiples.
        for len in [230, 240, 280, 480, 900] {
            let long = "x".repeat(len);
            let arrived = guest.sh(&format!("echo {long} | wc -c"))?;
            ensure!(
                arrived == (len + 1).to_string(),
                "of {len} bytes that were typed {arrived} arrived"
            );
        }
        Ok(())
    })
}

/// A running guest prints several lines in this time.
const SILENCE: Duration = Duration::from_millis(200);
/// How long the output of a paused guest may take to arrive.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// How many lines it prints: an emulated guest takes 15 ms for each.
const TICKS: u32 = 1500;
/// What it prints after these lines.
const ALL_TICKS: &str = "all-ticks";
/// How often it is paused meanwhile.
const PAUSES: u32 = 20;

/// A paused guest does not run, and pausing loses no output, whenever it happens.
pub fn pause_loses_nothing(_: &Fixture, guest: &mut Guest, _: &str) -> Result<()> {
    let log = guest.dmesg()?;
    let outpatch = guest.outpatch().clone();
    // Now and then the script waits until all output is printed (`stty` drains before it sets): on
    // a slow emulated CPU a console that always has more to print keeps one of the guest's CPUs in
    // its interrupt handler for so long that RCU reports a stall.
    guest.console().type_in(&format!(
        "i=0; while [ $i -lt {TICKS} ]; do echo tick-$i.; i=$((i+1)); \
         [ $((i % 100)) != 0 ] || {{ stty -echo; sleep 0.1; }}; done; echo {ALL_TICKS}\n",
    ))?;
    for _ in 0..PAUSES {
        outpatch.ok(&["pause"])?;
        // Output that was already printed may still arrive; a guest that runs never stops printing.
        let deadline = Instant::now() + SETTLE_LIMIT;
        let mut before = guest.console().text().len();
        loop {
            thread::sleep(SILENCE);
            let now = guest.console().text().len();
            if now == before {
                break;
            }
            ensure!(Instant::now() < deadline, "a paused guest prints");
            before = now;
        }
        outpatch.ok(&["resume"])?;
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(
        !guest.console().text().contains(ALL_TICKS),
        "it had printed all before the last pause"
    );
    let text = guest
        .console()
        .wait_for(ALL_TICKS, Duration::from_secs(60))?;
    for tick in 0..TICKS {
        ensure!(
            text.contains(&format!("tick-{tick}.")),
            "tick {tick} was lost: {:?}",
            text.split_once(&format!("tick-{}.", tick.saturating_sub(1)))
                .map_or(&*text, |(_, rest)| rest)
                .chars()
                .take(400)
                .collect::<String>()
        );
    }
    guest.expect_unharmed(&log)
}

/// Poweroff, reset by each method that a guest may choose, Ctrl-A x, `outpatch stop`, a panic's
/// reset and a triple fault each end the process with the documented status.
fn exit_statuses(fixture: &Fixture) -> Result<()> {
    let limit = Duration::from_secs(30);
    for (append, typed, status) in [
        // One vCPU boots in half the time; `guest_tools` ends guests with several.
        ("", "poweroff -f\n", 0),
        ("", "reboot -f\n", 0),
        ("reboot=k", "reboot -f\n", 0),
        ("reboot=a", "reboot -f\n", 0),
        ("", "\u{1}x", 0),
        ("", "echo c > /proc/sysrq-trigger\n", 0),
        // A guest that requests its own triple fault ends like any triple fault.
        ("reboot=t", "reboot -f\n", 1),
    ] {
        let mut guest = fixture.boot("6.12", 1, append)?;
        guest.console().type_in(typed)?;
        let end = guest
            .wait_end(limit)
            .with_context(|| format!("{append} typed {typed:?}"))?;
        ensure!(
            end.code() == Some(status),
            "{append} typed {typed:?}, the VMM ended with {end}"
        );
        ensure!(
            !guest.socket().exists(),
            "the socket still exists after {typed:?}"
        );
    }
    let mut guest = fixture.boot("6.12", 1, "")?;
    let requested = Instant::now();
    guest.outpatch().ok(&["stop"])?;
    let end = guest.wait_end(limit)?;
    ensure!(end.code() == Some(0), "stopped, the VMM ended with {end}");
    ensure!(
        requested.elapsed() < limit,
        "stopping took {:?}",
        requested.elapsed()
    );
    Ok(())
}
