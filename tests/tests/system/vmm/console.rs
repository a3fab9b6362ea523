//! The console under load: flooded by the guest, and not read by the user.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guests::drive::STOLEN_TIME;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for generation in ["5.10", "6.1", "6.12", "7.3"] {
        let flood = Scenario::new(format!("console::flood_{generation}"), move |fixture| {
            flood(fixture, generation)
        });
        // A plain run has the other one, whose guest prints as much at first, for less time.
        all.push(flood.extra_if(true));
        let stall = Scenario::new(format!("console::stall_{generation}"), move |fixture| {
            stall(fixture, generation)
        });
        all.push(stall.extra_if(generation != "6.12"));
    }
    all
}

/// For how long the console is flooded: longer than what the guest's watchdogs wait (20 s), twice.
const FLOOD: Duration = Duration::from_secs(50);
/// How many lines follow, each with its number.
const NUMBERED_LINES: u32 = 2000;

/// A guest that prints as fast as it can does nothing else less, and nothing of it is lost.
fn flood(fixture: &Fixture, generation: &str) -> Result<()> {
    let guest = fixture.boot(generation, 4, "softlockup_panic=1")?;
    fixture.with(guest, |guest| {
        let log = guest.dmesg()?;
        let before = guest.console().text().len();
        guest.sh_within(
            &format!(
                "timeout {} cat /dev/zero > /dev/ttyS0; [ $? = 143 ]",
                FLOOD.as_secs()
            ),
            FLOOD * 2,
        )?;
        let bytes = guest.console().text().len() - before;
        println!(
            "{generation}: {} bytes a second",
            bytes as f64 / FLOOD.as_secs_f64()
        );
        let started = Instant::now();
        let lines = guest.sh_within(&format!("seq {NUMBERED_LINES}"), Duration::from_secs(120))?;
        println!(
            "{generation}: {NUMBERED_LINES} lines in {:?}",
            started.elapsed()
        );
        let expected: Vec<String> = (1..=NUMBERED_LINES).map(|n| n.to_string()).collect();
        ensure!(lines.lines().eq(expected.iter()), "lines were lost");
        guest.expect_unharmed(&log)
    })
}

/// For how long it prints before its console is not read any more.
const BEFORE: Duration = Duration::from_secs(20);
/// For how long its console is not read: until the kernel's messages have filled the buffers, and
/// then for longer than its watchdogs wait (20 s).
const STALL: Duration = Duration::from_secs(75);
/// How many messages of 600 bytes the kernel prints meanwhile. It prints without interrupts, also
/// when the console takes no more; then the guest is held.
const MESSAGES: usize = 100;
/// How long all that waits may take to arrive.
const ARRIVE_LIMIT: Duration = Duration::from_secs(150);

/// A guest takes no harm when its console is not read while programs and the kernel print as much
/// as they can: programs wait, the guest is held for the kernel's messages, nothing is lost, and no watchdog
/// reports a lockup or a stall.
fn stall(fixture: &Fixture, generation: &str) -> Result<()> {
    let append = "softlockup_panic=1 printk.devkmsg=on";
    fixture.with(fixture.boot(generation, 4, append)?, |guest| {
        guest.sh("dmesg -c > /dev/null; dmesg -n 8")?;
        let time = (BEFORE + STALL).as_secs();
        guest.console().type_in(&format!(
            "x=0123456789; x=$x$x$x$x$x$x; x=$x$x$x$x$x$x$x$x$x$x; \
             (sleep {}; i=0; while [ $i -lt {MESSAGES} ]; do \
              echo \"<4>kernel-message $i $x\" > /dev/kmsg; i=$((i+1)); sleep 0.2; done) & \
             echo start-of-flood; timeout {time} seq 1000000 9000000; wait; echo end-of-flood\n",
            BEFORE.as_secs()
        ))?;
        guest
            .console()
            .wait_for("start-of-flood", Duration::from_secs(10))?;
        thread::sleep(BEFORE);
        guest.console().stall(STALL);
        let text = guest.console().wait_for("end-of-flood", ARRIVE_LIMIT)?;
        let (lines, messages) = without_messages(&text);
        println!(
            "{generation}: {lines} bytes of lines, {messages} messages",
            lines = lines.len()
        );
        ensure!(
            messages == MESSAGES,
            "{messages} of {MESSAGES} messages arrived"
        );
        expect_consecutive(&lines)?;

        let log = guest.sh("dmesg | grep -v kernel-message || true")?;
        let stolen = |line: &&str| STOLEN_TIME.iter().any(|text| line.contains(text));
        let harm: Vec<&str> = log.lines().filter(|line| !stolen(line)).collect();
        ensure!(harm.is_empty(), "in the guest's log: {harm:?}");
        let taint = guest.sh("cat /proc/sys/kernel/tainted; dmesg -n 1")?;
        ensure!(taint == "0", "the guest is tainted: {taint}");
        Ok(())
    })
}

/// What programs have printed, and the number of the kernel's messages, which can be in the middle
/// of a program's line.
fn without_messages(text: &str) -> (String, usize) {
    let (mut lines, mut messages) = (String::new(), 0);
    let mut rest = text;
    while let Some(at) = rest.find("kernel-message ") {
        let start = rest[..at].rfind('[').unwrap_or(at);
        lines.push_str(&rest[..start]);
        rest = rest[at..].split_once('\n').map_or("", |(_, rest)| rest);
        messages += 1;
    }
    lines.push_str(rest);
    (lines, messages)
}

/// Checks that each number is the one after that of the line before. The last one may have been
/// cut.
fn expect_consecutive(lines: &str) -> Result<()> {
    let mut numbers = lines
        .lines()
        .filter_map(|line| line.trim().parse::<u32>().ok());
    let count = lines.lines().filter(|line| !line.trim().is_empty()).count();
    let first = numbers.next().context("no lines")?;
    ensure!(first == 1_000_000, "the first line is {first}");
    let consecutive = numbers
        .zip(first + 1..)
        .take_while(|(found, due)| found == due);
    let last = consecutive.last().map_or(first, |(found, _)| found);
    let arrived = last - first + 1;
    // The rest of the line that starts the flood, its last line, and the marker after it.
    ensure!(
        (arrived as usize) + 3 >= count,
        "of {count} lines {arrived} are consecutive, up to {last}"
    );
    Ok(())
}
