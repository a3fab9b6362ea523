//! introspect compared with drgn, on core files of a guest under load: the same tasks, and the same
//! frames of every stack that introspect calls reliable.
//!
//! The guest runs in the bed and is dumped there; the cores are compared on the host, where nothing
//! is emulated. A plain run compares a few pauses of one generation; `OUTPATCH_DIFFERENTIAL=PAUSES`
//! requests that many of every generation.

mod compare;
mod crash;
mod drgn;
mod introspected;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;
use guests::kernel::Generation;
use guests::kernel::prepared::PreparedKernel;

use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// How many pauses a plain run compares.
const PLAIN_PAUSES: u64 = 12;
/// How many pauses are taken at most for each that is requested: one with a lock held compares
/// nothing, and another is taken in its place.
const MAX_PAUSES_PER_REQUESTED: u64 = 3;
/// How many cores wait for the comparison at most before the guest is dumped again.
const MAX_WAITING: usize = 3;
/// The file to which the comparison writes one byte for each core that has a lock held.
const LOCKED: &str = "locked";
/// The file that the comparison leaves when it has failed and compares no more.
const GAVE_UP: &str = "gave-up";
/// How long a pause may take in the bed, with the dump.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
/// How long the guest may take to put the first processes to sleep with tracers on.
const TRACED_LIMIT: Duration = Duration::from_secs(180);
/// Less memory than other guests have: all of it is dumped, many times.
const MEMORY_MIB: u32 = 256;

/// Turns tracing on and off in a loop, so that pauses fall into every state of it: function and
/// graph tracing, probes on entries and on returns, of functions that tasks sleep in and of
/// functions that are called all the time. A round may take a minute, as each step waits for all
/// CPUs several times, so the loop can end after any step. At each step other processes go to sleep,
/// so that some sleep in functions whose return addresses were replaced, also by a tracer that is
/// off again. Those that went to sleep first, with both kinds of tracers on, stay.
const TRACING: &str = r#"cd /sys/kernel/tracing
echo 'schedule* vfs_* do_wait* kernel_wait4 tcp_sendmsg* tcp_recvmsg* do_nanosleep hrtimer_nanosleep futex_* do_futex do_sys_poll pipe_* kthread worker_thread do_exit' > set_ftrace_filter
probes='r:outpatch/c do_nanosleep
r:outpatch/d vfs_read
r:outpatch/e do_sys_poll
r:outpatch/f do_wait
r:outpatch/g hrtimer_nanosleep
r:outpatch/h do_futex'
echo function_graph > current_tracer
echo "$probes" > kprobe_events
echo 1 > events/outpatch/enable
cp $(command -v sleeper) /tmp/held
(/tmp/held 20 &); sleep 1
echo 0 > events/outpatch/enable
echo > kprobe_events
echo nop > current_tracer
touch /tmp/traced
going() { [ ! -e /tmp/stop ]; }
sleepers() { killall -q sleeper; going && { (sleeper 40 &); sleep 0.3; }; }
while going; do
	for tracer in function function_graph nop; do
	going && echo $tracer > current_tracer && sleepers && sleep 0.4
	done
	going && echo "p:outpatch/a vfs_read
p:outpatch/b schedule
$probes" > kprobe_events
	going && echo 1 > events/outpatch/enable && sleepers && sleep 0.5
	going && echo 0 > events/outpatch/enable
	going && echo > kprobe_events && sleep 0.3
done
rm /tmp/stop"#;

pub fn scenarios() -> Vec<Scenario> {
    let requested = env::var("OUTPATCH_DIFFERENTIAL").ok();
    let pauses = requested.as_deref().and_then(|count| count.parse().ok());
    let generations = match pauses {
        Some(_) => &Generation::ALL[..],
        None => &[Generation::V6_1],
    };
    let pauses = pauses.unwrap_or(PLAIN_PAUSES);
    let scenario = |generation: &Generation| {
        let generation = *generation;
        let is_requested = requested.is_some();
        let limit =
            Duration::from_secs(300) + PAUSE_LIMIT * u32::try_from(pauses).unwrap_or(u32::MAX);
        Scenario::new(format!("differential::{generation}"), move |fixture| {
            hand_over(fixture, generation, pauses)
        })
        .limit(limit)
        .prepare(move |assets| prepare(assets, generation))
        .meanwhile(move |assets, cores, ended| {
            let bound = unreliable_bound(is_requested);
            compare_cores(assets, generation, bound, cores, ended)
        })
    };
    generations.iter().map(scenario).collect()
}

/// On the host: adds the newest kernel of the generation that has debugging information.
fn prepare(assets: &mut Assets, generation: Generation) -> Result<()> {
    let (kernel, vmlinux) = PreparedKernel::prepare_debug(generation)?;
    assets.kernels.insert(key(generation), kernel);
    assets.vmlinux.insert(key(generation), vmlinux);
    Ok(())
}

/// At most one in this many stacks may be unreliable. Nearly all that are belong to tasks that run
/// in a tracer's code: a plain run has some ten of these among a thousand stacks, too few for the
/// bound of a long run.
fn unreliable_bound(is_requested: bool) -> u64 {
    if is_requested { 100 } else { 10 }
}

/// On the host: compares the cores as they come. When this fails, the scenario ends too.
fn compare_cores(
    assets: &Assets,
    generation: Generation,
    unreliable_bound: u64,
    cores: &Path,
    ended: &AtomicBool,
) -> Result<()> {
    let vmlinux = assets.vmlinux.get(&key(generation)).context("no vmlinux")?;
    let compared = compare::all(generation, vmlinux, unreliable_bound, cores, ended);
    if compared.is_err() {
        fs::write(cores.join(GAVE_UP), "")?;
    }
    compared
}

/// The name of the kernel among the assets.
fn key(generation: Generation) -> String {
    format!("{generation}-debug")
}

/// In the bed: dumps a guest under load, many times.
fn hand_over(fixture: &Fixture, generation: Generation, pauses: u64) -> Result<()> {
    let guest = fixture.boot_with(&key(generation), 4, MEMORY_MIB, "")?;
    fixture.with(guest, |guest| {
        let log = guest.dmesg()?;
        guest.sh("churn /tmp/churn & sleep 1")?;
        guest.sh(&format!("({TRACING}) > /tmp/tracing 2>&1 & sleep 0.1"))?;
        guest.sh_within("until [ -e /tmp/traced ]; do sleep 0.1; done", TRACED_LIMIT)?;
        dumps(fixture, guest, pauses)?;
        guest.sh("touch /tmp/stop; while [ -e /tmp/stop ]; do sleep 0.1; done")?;
        let complaints = guest.sh("cat /tmp/tracing")?;
        ensure!(complaints.is_empty(), "tracing did not work: {complaints}");
        guest.sh("killall churn; while [ ! -e /tmp/churn ]; do sleep 0.1; done")?;
        let answers = guest.sh("cat /tmp/churn")?;
        println!("{generation}: {}", answers.replace('\n', ", "));
        ensure!(
            answers.lines().all(|line| line.ends_with(" wrong=0")),
            "a system call returned a wrong result"
        );
        guest.expect_unharmed(&log)
    })
}

/// Takes pauses until `requested` of them could be compared.
fn dumps(fixture: &Fixture, guest: &Guest, requested: u64) -> Result<()> {
    let mut taken = 0;
    loop {
        // In this order: the comparison reports a lock before it is done with the core.
        let all_compared = waiting(fixture)? == 0;
        let locked = locked(fixture)?;
        if taken < requested + locked {
            ensure!(
                taken < requested * MAX_PAUSES_PER_REQUESTED,
                "a lock was held in {locked} of {taken} pauses"
            );
            dump(fixture, guest, taken).with_context(|| format!("pause {taken}"))?;
            taken += 1;
        } else if all_compared {
            return Ok(());
        } else {
            wait_for_comparison(fixture)?;
        }
    }
}

fn dump(fixture: &Fixture, guest: &Guest, pause: u64) -> Result<()> {
    // Irregular intervals, so that pauses do not fall into step with the guest's timers.
    thread::sleep(Duration::from_millis(20 + pause * 67 % 240));
    let draft = fixture.scratch().join(format!("{pause:05}.part"));
    let file = draft.to_str().context("a scratch folder in UTF-8")?;
    guest.outpatch().ok(&["dump", file])?;
    fs::rename(&draft, draft.with_extension("core"))?;
    while waiting(fixture)? > MAX_WAITING {
        wait_for_comparison(fixture)?;
    }
    Ok(())
}

fn wait_for_comparison(fixture: &Fixture) -> Result<()> {
    let gave_up = fixture.scratch().join(GAVE_UP).exists();
    ensure!(!gave_up, "the comparison on the host gave up");
    thread::sleep(Duration::from_millis(50));
    Ok(())
}

/// How many cores had a lock held, as the comparison reports.
fn locked(fixture: &Fixture) -> Result<u64> {
    match fs::read(fixture.scratch().join(LOCKED)) {
        Ok(bytes) => Ok(bytes.len() as u64),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// How many cores are not compared yet.
fn waiting(fixture: &Fixture) -> Result<usize> {
    let names = fs::read_dir(fixture.scratch())?.flatten();
    let cores = names.filter(|name| name.path().extension().is_some_and(|end| end == "core"));
    Ok(cores.count())
}
