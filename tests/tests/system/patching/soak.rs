//! Patches applied and reverted many times, under load that checks its own results: forks, threads,
//! files, TCP, timers, signals, a patched system call that is called all the time, and sleepers in
//! a patched function.
//!
//! A plain run takes some seconds; `OUTPATCH_SOAK=SECONDS` requests another duration.

use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Rest};
use serde_json::{Value, json};

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::apply_revert::TRANSITION_LIMIT;

/// How long a plain run takes, in seconds.
const PLAIN_SECONDS: u64 = 15;
/// The file and the name of each patch.
const PATCHES: [(&str, &str); 4] = [
    ("livepatch-sample", "livepatch_sample"),
    ("getpid", "getpid"),
    ("pause", "pause"),
    ("two-functions", "two_functions"),
];
/// After how long blocking tasks are sent the fake signal, in milliseconds.
const SIGNAL_AFTER_MS: u64 = 100;

pub fn scenarios() -> Vec<Scenario> {
    let requested = env::var("OUTPATCH_SOAK").ok();
    let seconds = requested.and_then(|seconds| seconds.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(PLAIN_SECONDS));
    [("6.1", 2), ("6.12", 4), ("7.3", 4)]
        .map(|(generation, cpus)| {
            Scenario::new(format!("soak::under_load_{generation}"), move |fixture| {
                soak(fixture, generation, cpus, time)
            })
            .limit(time + Duration::from_secs(600))
            .extra_if(generation != "7.3")
        })
        .into()
}

fn soak(fixture: &Fixture, generation: &str, cpus: u32, time: Duration) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    fixture.with(fixture.boot(generation, cpus, "")?, |guest| {
        let (outpatch, rest) = (guest.outpatch().clone(), guest.rest());
        let log = guest.dmesg()?;
        guest.sh("churn /tmp/churn & hammer 4 /tmp/hammer & sleeper 20 & sleep 2")?;
        let end = Instant::now() + time;
        let mut rounds = 0;
        while Instant::now() < end {
            for (file, name) in PATCHES {
                let patch = rest.start(&fs::read(kernel.patch(file)?)?)?;
                complete_with_signal(&rest, patch)?;
                let patch = rest.change(name, &json!({"enabled": false}))?;
                complete_with_signal(&rest, patch)?;
                rounds += 1;
            }
        }
        let pauses = outpatch.json(&["status"])?["vm"]["pauses"].clone();
        println!(
            "{generation} {cpus} vCPUs: {rounds} rounds in {time:?}; pauses: {} of {} µs in all, \
             the longest {} µs, {}",
            pauses["count"], pauses["total_us"], pauses["longest_us"], pauses["histogram"]
        );
        expect_right_results(guest)?;
        guest.expect_unharmed(&log)
    })
}

/// Waits until the transition has completed, with the fake signal.
fn complete_with_signal(rest: &Rest, mut patch: Value) -> Result<()> {
    if patch["transition"] == true {
        let name = patch["name"].as_str().context("no name")?.to_owned();
        let signal = json!({"signal": true, "signal_after_ms": SIGNAL_AFTER_MS});
        // The transition may have completed just now.
        if let Ok(status) = rest.change(&name, &signal) {
            patch = status;
        }
    }
    rest.wait_complete(patch, TRANSITION_LIMIT).map(drop)
}

/// Checks that every system call that the load made returned the right result.
pub fn expect_right_results(guest: &mut Guest) -> Result<()> {
    guest.sh("killall churn; while [ ! -e /tmp/churn ]; do sleep 0.1; done")?;
    guest.sh("killall hammer; while [ ! -e /tmp/hammer ]; do sleep 0.1; done")?;
    let churn = guest.sh("cat /tmp/churn")?;
    let hammer = guest.sh("head -n 1 /tmp/hammer")?;
    println!("{}; {hammer}", churn.replace('\n', ", "));
    ensure!(
        churn.lines().all(|line| line.ends_with(" wrong=0")) && hammer.contains(" wrong=0 "),
        "a system call returned a wrong result"
    );
    Ok(())
}
