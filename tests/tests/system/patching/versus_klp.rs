//! outpatch beside the guest's own livepatching: the same `.ko` files, the same guest, the same load, one after the other.

use std::{
    env,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;
use rustix::process::{getpriority_process, setpriority_process};
use serde_json::json;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// Transitions of each, there and back; `OUTPATCH_BESIDE=ROUNDS` asks for more.
const ROUNDS: usize = 3;
/// How long one of the guest's own may take. 6.12 rewrites every place in the kernel where a task may give way
/// (`kernel/sched/core.c: sched_dynamic_klp_enable`), and each takes some interrupts from CPU to CPU: minutes, where the vCPUs share one.
const LIMIT: Duration = Duration::from_secs(600);

/// The nice value of who asks, which is that of outpatch's own threads.
const FRONT: i32 = -20;

pub fn scenarios() -> Vec<Scenario> {
    let asked = env::var("OUTPATCH_BESIDE").ok();
    let rounds = asked
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    let each = ["6.1", "6.12", "7.3"].into_iter().flat_map(|generation| {
        LOADS.map(|load| {
            let name = format!("versus_klp::{}_{generation}", load.scenario);
            Scenario::new(name, move |fixture| {
                faster(fixture, generation, load, rounds)
            })
            .limit(Duration::from_secs(7200))
            .extra_if(true)
        })
    });
    each.collect()
}

/// Who is in the way of a patch.
#[derive(Clone, Copy)]
struct Load {
    scenario: &'static str,
    what: &'static str,
    /// The patch's file, and the name of its module.
    file: &'static str,
    name: &'static str,
    /// Whether ours is to send the fake signal; the guest's own always does, after 15 s (`transition.c: SIGNALS_TIMEOUT`).
    signal: bool,
}

const LOADS: [Load; 2] = [
    Load {
        scenario: "faster_than_the_guests_own",
        what: "nobody in the function",
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
        // Sleepers in callers of the functions, in vfs_read for one, and in one of them; two who do not leave user mode.
        guest.sh("sleeper 100 & spin 2 & sleep 2")?;
        let module = std::fs::read(fixture.kernel(generation)?.patch(load.file)?)?;
        let pair = Pair { load, module };
        let (ours, theirs) = pair.rounds(guest, rounds)?;
        compare(generation, load.what, &ours, &theirs)
    })
}

/// Prints both, and by how much outpatch is the faster one, which it is.
fn compare(generation: &str, load: &str, ours: &[Duration], theirs: &[Duration]) -> Result<()> {
    println!("{generation}, {load}: outpatch {ours:?}, the guest's own {theirs:?}");
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "{generation}, {load}: in the median outpatch takes {ours:?}, the guest's own {theirs:?}, {:.0} times that",
        theirs.as_secs_f64() / ours.as_secs_f64()
    );
    ensure!(ours < theirs, "outpatch takes longer");
    Ok(())
}

/// One module, for both.
struct Pair {
    load: Load,
    module: Vec<u8>,
}

impl Pair {
    /// How long each took to apply, from the request to the end of the transition, in turns.
    fn rounds(&self, guest: &mut Guest, rounds: usize) -> Result<(Vec<Duration>, Vec<Duration>)> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            // A guest that is lost late takes an hour with it.
            let before = || format!("after outpatch {ours:?}, the guest's own {theirs:?}");
            let our = self.ours(guest).with_context(before)?;
            let their = self.theirs(guest).with_context(before)?;
            ours.push(our);
            theirs.push(their);
        }
        Ok((ours, theirs))
    }

    fn ours(&self, guest: &Guest) -> Result<Duration> {
        let rest = guest.rest();
        let asked = Instant::now();
        as_from_elsewhere(|| {
            if !self.load.signal {
                return rest.apply(&self.module, LIMIT);
            }
            let mut patch = rest.begin(&self.module)?;
            if patch["transition"] == true {
                patch = rest.change(self.load.name, &json!({"signal": true}))?;
            }
            rest.end(patch, LIMIT)
        })?;
        let took = asked.elapsed();
        guest
            .outpatch()
            .ok(&["revert", self.load.name, "--signal-after", "0"])?;
        Ok(took)
    }

    /// By the guest's own clock, which stands still for nobody here.
    fn theirs(&self, guest: &mut Guest) -> Result<Duration> {
        let (file, name) = (self.load.file, self.load.name);
        let attribute = format!("/sys/kernel/livepatch/{name}");
        let settled = format!(
            "while [ \"$(cat {attribute}/transition 2>/dev/null)\" = 1 ]; do sleep 0.02; done"
        );
        let took = guest.sh_within(
            &format!(
                "read a b < /proc/uptime; insmod /lib/patches/{file}.ko; {settled}; read c d < /proc/uptime; echo $a $c"
            ),
            LIMIT,
        )?;
        guest.sh_within(
            &format!("echo 0 > {attribute}/enabled; {settled}; while ! rmmod {name} 2>/dev/null; do sleep 0.1; done"),
            LIMIT,
        )?;
        let times = took
            .split(' ')
            .map(str::parse)
            .collect::<Result<Vec<f64>, _>>()?;
        let [from, to] = times[..] else {
            anyhow::bail!("the guest says {took:?}");
        };
        Ok(Duration::from_secs_f64(to - from))
    }
}

/// Who asks does not run on a guest's processors; in the bed there is but one for all, and this lets it go before the vCPUs. It waits
/// asleep, until outpatch says that the transition has ended.
fn as_from_elsewhere<T>(ask: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = getpriority_process(None)?;
    // A host with processors enough may not allow it, and does not need it.
    let moved = setpriority_process(None, FRONT).is_ok();
    let answer = ask();
    if moved {
        setpriority_process(None, before)?;
    }
    answer
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
