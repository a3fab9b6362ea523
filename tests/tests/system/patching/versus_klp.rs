//! outpatch compared with the guest's own livepatching: the same `.ko` files, the same guest, the
//! same load, one after the other.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::Guest;
use rustix::process::{getpriority_process, setpriority_process};
use serde_json::json;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// How often each applies and reverts; `OUTPATCH_BESIDE=ROUNDS` requests another number.
const ROUNDS: usize = 3;
/// How long one transition of the guest's own may take. 6.12 rewrites every place in the kernel
/// where a task may reschedule (`kernel/sched/core.c: sched_dynamic_klp_enable`), and each takes
/// some interrupts from CPU to CPU: minutes, where the vCPUs share one CPU.
const LIMIT: Duration = Duration::from_secs(600);

/// The nice value of the measuring thread, which is that of outpatch's own threads.
const NICE: i32 = -20;

pub fn scenarios() -> Vec<Scenario> {
    let requested = env::var("OUTPATCH_BESIDE").ok();
    let rounds = requested.and_then(|rounds| rounds.parse().ok());
    let rounds = rounds.unwrap_or(ROUNDS);
    let each = ["6.1", "6.12", "7.3"].into_iter().flat_map(|generation| {
        LOADS.map(|load| {
            let name = format!("versus_klp::{}_{generation}", load.scenario);
            let run = move |fixture: &Fixture| faster(fixture, generation, load, rounds);
            Scenario::new(name, run)
                .limit(Duration::from_secs(7200))
                .extra_if(true)
        })
    });
    each.collect()
}

/// A patch, and whether tasks block it.
#[derive(Clone, Copy)]
struct Load {
    scenario: &'static str,
    what: &'static str,
    /// The patch's file, without `.ko`.
    file: &'static str,
    /// The name of its module.
    name: &'static str,
    /// Whether outpatch is to send the fake signal; the guest's own livepatching always does, after
    /// 15 s (`transition.c: SIGNALS_TIMEOUT`).
    signal: bool,
}

const LOADS: [Load; 2] = [
    Load {
        scenario: "faster_than_the_guests_own",
        what: "no task in the function",
        file: "livepatch-sample",
        name: "livepatch_sample",
        signal: false,
    },
    Load {
        scenario: "faster_with_the_signal",
        what: "sleepers in the function",
        file: "pause",
        name: "pause",
        signal: true,
    },
];

fn faster(fixture: &Fixture, generation: &str, load: Load, rounds: usize) -> Result<()> {
    fixture.with(fixture.boot(generation, 2, "")?, |guest| {
        // Sleepers in callers of the functions, such as vfs_read, and in one of them; two tasks
        // that do not leave user mode.
        guest.sh("sleeper 100 & spin 2 & sleep 2")?;
        let module = std::fs::read(fixture.kernel(generation)?.patch(load.file)?)?;
        let patch = Patch { load, module };
        let (outpatch, klp) = patch.rounds(guest, rounds)?;
        compare(generation, load.what, &outpatch, &klp)
    })
}

/// Prints both, and by how much outpatch is faster. Fails if it is not.
fn compare(generation: &str, load: &str, outpatch: &[Duration], klp: &[Duration]) -> Result<()> {
    println!("{generation}, {load}: outpatch {outpatch:?}, the guest's own {klp:?}");
    let (outpatch, klp) = (median(outpatch), median(klp));
    println!(
        "{generation}, {load}: in the median outpatch takes {outpatch:?}, the guest's own {klp:?}, \
         {:.0} times that",
        klp.as_secs_f64() / outpatch.as_secs_f64()
    );
    ensure!(outpatch < klp, "outpatch takes longer");
    Ok(())
}

/// One module, for both.
struct Patch {
    load: Load,
    module: Vec<u8>,
}

impl Patch {
    /// How long outpatch and the guest's own livepatching took to apply the module in each round,
    /// from the request until the transition had completed.
    fn rounds(&self, guest: &mut Guest, rounds: usize) -> Result<(Vec<Duration>, Vec<Duration>)> {
        let (mut outpatch, mut klp) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            // A guest that is lost late would lose the measurements of an hour.
            let before = || format!("after outpatch {outpatch:?}, the guest's own {klp:?}");
            let by_outpatch = self.by_outpatch(guest).with_context(before)?;
            let by_klp = self.by_klp(guest).with_context(before)?;
            outpatch.push(by_outpatch);
            klp.push(by_klp);
        }
        Ok((outpatch, klp))
    }

    fn by_outpatch(&self, guest: &Guest) -> Result<Duration> {
        let rest = guest.rest();
        let started = Instant::now();
        with_priority(|| {
            if !self.load.signal {
                return rest.apply(&self.module, LIMIT);
            }
            let mut patch = rest.start(&self.module)?;
            if patch["transition"] == true {
                patch = rest.change(self.load.name, &json!({"signal": true}))?;
            }
            rest.wait_complete(patch, LIMIT)
        })?;
        let took = started.elapsed();
        guest
            .outpatch()
            .ok(&["revert", self.load.name, "--signal-after", "0"])?;
        Ok(took)
    }

    /// Measured by the guest's own clock, which does not stop here.
    fn by_klp(&self, guest: &mut Guest) -> Result<Duration> {
        let (file, name) = (self.load.file, self.load.name);
        let attribute = format!("/sys/kernel/livepatch/{name}");
        let completed = format!(
            "while [ \"$(cat {attribute}/transition 2>/dev/null)\" = 1 ]; do sleep 0.02; done"
        );
        let times = guest.sh_within(
            &format!(
                "read a b < /proc/uptime; insmod /lib/patches/{file}.ko; {completed}
read c d < /proc/uptime; echo $a $c"
            ),
            LIMIT,
        )?;
        guest.sh_within(
            &format!(
                "echo 0 > {attribute}/enabled; {completed}
while ! rmmod {name} 2>/dev/null; do sleep 0.1; done"
            ),
            LIMIT,
        )?;
        let seconds = times
            .split(' ')
            .map(str::parse)
            .collect::<Result<Vec<f64>, _>>()?;
        let [from, to] = seconds[..] else {
            bail!("the guest printed {times:?}");
        };
        Ok(Duration::from_secs_f64(to - from))
    }
}

/// Runs `request` as if on a CPU that no vCPU shares. In the bed all share one, so the calling
/// thread gets a priority above that of the vCPUs; it sleeps until outpatch reports the end of the
/// transition.
fn with_priority<T>(request: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = getpriority_process(None)?;
    // A host with enough CPUs may not permit this, and does not need it.
    let raised = setpriority_process(None, NICE).is_ok();
    let result = request();
    if raised {
        setpriority_process(None, before)?;
    }
    result
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
