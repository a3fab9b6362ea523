//! Patches applied and reverted many times, under load that checks its own results: forks, threads,
//! files, TCP, timers, signals, a patched system call that is called all the time, and sleepers in
//! a patched function. Meanwhile the guest's tracers are turned on and off, and its console, on
//! which it prints, is not read for up to a minute at a time.
//!
//! A plain run takes some seconds; `OUTPATCH_SOAK=SECONDS` requests another duration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, anyhow, ensure};
use guests::drive::{Console, Guest, Rest};
use guests::kernel::prepared::PreparedKernel;
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
/// Turns each kind of tracer on for some seconds, on functions in which tasks of the load sleep and
/// return, so that their return addresses are replaced meanwhile. Ends at the first error; counts
/// in a file.
const TRACERS: &str = r"(set -e; cd /sys/kernel/tracing; i=0
on() { sleep 2; i=$((i+1)); echo $i > /tmp/tracers; }
while :; do
  for tracer in function_graph function; do
    echo do_nanosleep do_sys_poll do_wait > set_ftrace_filter; echo $tracer > current_tracer; on
    echo nop > current_tracer; echo > set_ftrace_filter; sleep 1
  done
  echo 'r:soak/nanosleep do_nanosleep' > kprobe_events
  echo 'r:soak/poll do_sys_poll' >> kprobe_events
  echo 1 > events/soak/enable; on
  echo 0 > events/soak/enable; echo > kprobe_events; sleep 1
done) 2> /tmp/tracers-error & echo $! > /tmp/tracers-pid";
/// Waits until the first tracer was on, or there was an error.
const FIRST_TRACER: &str =
    "while kill -0 $(cat /tmp/tracers-pid) && [ ! -e /tmp/tracers ]; do sleep 0.2; done";
/// How long that may take under the load.
const TRACER_LIMIT: Duration = Duration::from_secs(120);
/// Prints on the console.
const PRINTER: &str =
    "(while :; do seq 100000 100500; sleep 0.5; done) & echo $! > /tmp/printer-pid";
/// For how long the console is not read, again and again, and for how long it is read in between.
const STALLS: [Duration; 3] = [
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_secs(60),
];
const READ: Duration = Duration::from_secs(10);

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
        guest.sh(TRACERS)?;
        guest.sh_within(FIRST_TRACER, TRACER_LIMIT)?;
        guest.sh(PRINTER)?;
        let end = Instant::now() + time;
        let ended = AtomicBool::new(false);
        let console = guest.console();
        let rounds = thread::scope(|scope| {
            let stalls = scope.spawn(|| stall(console, end, &ended));
            let rounds = apply_and_revert(kernel, &rest, end);
            ended.store(true, Ordering::Release);
            let stalls = stalls
                .join()
                .map_err(|_| anyhow!("the console's part panicked"))?;
            println!("{generation}: the console was not read {stalls} times");
            rounds
        })?;
        let pauses = outpatch.json(&["status"])?["vm"]["pauses"].clone();
        println!(
            "{generation} {cpus} vCPUs: {rounds} rounds in {time:?}; pauses: {} of {} µs in all, \
             the longest {} µs, {}",
            pauses["count"], pauses["total_us"], pauses["longest_us"], pauses["histogram"]
        );
        let tracers = guest.sh("kill $(cat /tmp/printer-pid)
kill -0 $(cat /tmp/tracers-pid) && cat /tmp/tracers || cat /tmp/tracers-error")?;
        let tracers = tracers.lines().last().unwrap_or_default();
        let traced: u32 = tracers
            .parse()
            .with_context(|| format!("tracers: {tracers}"))?;
        println!("{generation}: tracers were turned on {traced} times");
        guest.sh(
            "kill $(cat /tmp/tracers-pid); cd /sys/kernel/tracing; echo nop > current_tracer
echo > set_ftrace_filter; [ ! -e events/soak/enable ] || echo 0 > events/soak/enable
echo > kprobe_events",
        )?;
        expect_right_results(guest)?;
        guest.expect_unharmed(&log)
    })
}

/// Applies and reverts each patch in turn until `end`. Returns how often.
fn apply_and_revert(kernel: &PreparedKernel, rest: &Rest, end: Instant) -> Result<u32> {
    let mut rounds = 0;
    while Instant::now() < end {
        for (file, name) in PATCHES {
            let module = fs::read(kernel.patch(file)?)?;
            let patch = until_available(|| rest.start(&module))?;
            complete_with_signal(rest, patch)?;
            let patch = until_available(|| rest.change(name, &json!({"enabled": false})))?;
            complete_with_signal(rest, patch)?;
            rounds += 1;
        }
    }
    Ok(rounds)
}

/// Tries again while the answer is to try again: turning a tracer on or off holds a lock of ftrace
/// for seconds in an emulated guest.
fn until_available(request: impl Fn() -> Result<Value>) -> Result<Value> {
    let deadline = Instant::now() + TRANSITION_LIMIT;
    loop {
        match request() {
            Err(error)
                if error.to_string().contains(r#""kind":"unavailable""#)
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(100));
            }
            result => return result,
        }
    }
}

/// Does not read the console for a while, again and again until `end` or until all else has ended.
/// Returns how often.
fn stall(console: &Console, end: Instant, ended: &AtomicBool) -> u32 {
    let mut count = 0;
    for stall in STALLS.into_iter().cycle() {
        if ended.load(Ordering::Acquire) {
            break;
        }
        let left = end.saturating_duration_since(Instant::now());
        console.stall(stall.min(left));
        count += 1;
        thread::sleep(READ.min(end.saturating_duration_since(Instant::now())));
        if Instant::now() >= end {
            break;
        }
    }
    count
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
