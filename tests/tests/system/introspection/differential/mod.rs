//! introspect against drgn, on core files of a guest that works hard: the same tasks, and every stack that is called reliable the
//! same, frame by frame.
//!
//! The guest runs in the bed and is dumped there; the cores are judged on the host, where nothing is emulated. A plain run compares
//! a few pauses of one generation; `OUTPATCH_DIFFERENTIAL=PAUSES` asks for that many of every generation.

mod compare;
mod crash;
mod drgn;
mod introspected;

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use guests::drive::Guest;
use guests::kernel::Generation;
use guests::kernel::stock::PreparedKernel;

use crate::Scenario;
use crate::harness::fixture::Fixture;

/// Pauses in a plain run.
const FEW: u64 = 12;
/// Pauses at the most for each that is asked for: one with a lock held compares nothing, and another is taken in its place.
const MOST_PER_ASKED: u64 = 3;
/// Cores that wait for the judge before the guest is left alone for a while.
const MOST_WAITING: usize = 3;
/// Where the judge writes one byte for each core that has a lock held.
const LOCKED: &str = "locked";
/// Left by a judge that compares no more.
const GAVE_UP: &str = "gave-up";
/// What a pause may cost in the bed, with the dump.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
/// Less memory than other guests: all of it is dumped, many times.
const MEMORY_MIB: u32 = 256;

/// Turned on and off in a loop, so that pauses fall into every state of it: function and graph tracing, probes on entries and on
/// returns, of functions that tasks sleep in and that are called all the time. A round takes a minute at times, as each step waits for
/// all CPUs, several times: it ends behind any step.
const TRACING: &str = r#"cd /sys/kernel/tracing
echo 'schedule* vfs_* do_wait* kernel_wait4 tcp_sendmsg* tcp_recvmsg* do_nanosleep hrtimer_nanosleep futex_* do_futex do_sys_poll pipe_* kthread worker_thread do_exit' > set_ftrace_filter
going() { [ ! -e /tmp/stop ]; }
while going; do
	for tracer in function function_graph nop; do going && echo $tracer > current_tracer && sleep 0.4; done
	going && echo 'p:outpatch/a vfs_read
p:outpatch/b schedule
r:outpatch/c do_nanosleep
r:outpatch/d vfs_read
r:outpatch/e do_sys_poll
r:outpatch/f do_wait' > kprobe_events
	going && echo 1 > events/outpatch/enable && sleep 0.5
	going && echo 0 > events/outpatch/enable
	going && echo > kprobe_events && sleep 0.3
done
rm /tmp/stop"#;

pub fn scenarios() -> Vec<Scenario> {
    let asked = env::var("OUTPATCH_DIFFERENTIAL").ok();
    let pauses = asked.as_deref().and_then(|count| count.parse().ok());
    let generations = match pauses {
        Some(_) => &Generation::ALL[..],
        None => &[Generation::V6_1],
    };
    let pauses = pauses.unwrap_or(FEW);
    let scenario = |generation: &Generation| {
        let generation = *generation;
        let limit =
            Duration::from_secs(300) + PAUSE_LIMIT * u32::try_from(pauses).unwrap_or(u32::MAX);
        Scenario::new(format!("differential::{generation}"), move |fixture| {
            hand_over(fixture, generation, pauses)
        })
        .limit(limit)
        .judged(generation)
    };
    generations.iter().map(scenario).collect()
}

/// The kernel of a generation that has debugging information, under the name that [`hand_over`] looks for, and that information.
pub fn prepare(generation: Generation) -> Result<(String, PreparedKernel, PathBuf)> {
    let (stock, vmlinux) = PreparedKernel::prepare_debug(generation)?;
    Ok((name(generation), stock, vmlinux))
}

/// On the host: the judge, whose giving up ends the scenario too.
pub fn judged(
    generation: Generation,
    vmlinux: &Path,
    cores: &Path,
    ended: &AtomicBool,
) -> Result<()> {
    let judged = compare::judge(generation, vmlinux, cores, ended);
    if judged.is_err() {
        fs::write(cores.join(GAVE_UP), "")?;
    }
    judged
}

fn name(generation: Generation) -> String {
    format!("{generation}-debug")
}

/// In the bed: dumps a busy guest again and again.
fn hand_over(fixture: &Fixture, generation: Generation, pauses: u64) -> Result<()> {
    let guest = fixture.boot_with(&name(generation), 4, MEMORY_MIB, "")?;
    fixture.with(guest, |guest| {
        let log = guest.dmesg()?;
        guest.sh("churn /tmp/churn & sleeper 40 & sleep 1")?;
        guest.sh(&format!("({TRACING}) > /tmp/tracing 2>&1 & sleep 0.1"))?;
        dumps(fixture, guest, pauses)?;
        guest.sh("touch /tmp/stop; while [ -e /tmp/stop ]; do sleep 0.1; done")?;
        let complaints = guest.sh("cat /tmp/tracing")?;
        ensure!(complaints.is_empty(), "tracing did not work: {complaints}");
        guest.sh("killall churn; while [ ! -e /tmp/churn ]; do sleep 0.1; done")?;
        let answers = guest.sh("cat /tmp/churn")?;
        println!("{generation}: {}", answers.replace('\n', ", "));
        ensure!(
            answers.lines().all(|line| line.ends_with(" wrong=0")),
            "a system call answered wrongly"
        );
        guest.expect_unharmed(&log)
    })
}

/// Takes pauses until so many could be compared.
fn dumps(fixture: &Fixture, guest: &Guest, asked: u64) -> Result<()> {
    let mut taken = 0;
    loop {
        // In this order: the judge tells of a lock before it is done with the core.
        let all_judged = waiting(fixture)? == 0;
        let locked = locked(fixture)?;
        if taken < asked + locked {
            ensure!(
                taken < asked * MOST_PER_ASKED,
                "a lock was held in {locked} of {taken} pauses"
            );
            dump(fixture, guest, taken).with_context(|| format!("pause {taken}"))?;
            taken += 1;
        } else if all_judged {
            return Ok(());
        } else {
            wait_for_judge(fixture)?;
        }
    }
}

fn dump(fixture: &Fixture, guest: &Guest, pause: u64) -> Result<()> {
    // No rhythm, so that pauses do not fall into step with the guest's timers.
    thread::sleep(Duration::from_millis(20 + pause * 67 % 240));
    let draft = fixture.scratch().join(format!("{pause:05}.part"));
    let file = draft.to_str().context("a scratch folder in UTF-8")?;
    guest.outpatch().ok(&["dump", file])?;
    fs::rename(&draft, draft.with_extension("core"))?;
    while waiting(fixture)? > MOST_WAITING {
        wait_for_judge(fixture)?;
    }
    Ok(())
}

fn wait_for_judge(fixture: &Fixture) -> Result<()> {
    ensure!(
        !fixture.scratch().join(GAVE_UP).exists(),
        "the judge gave up"
    );
    thread::sleep(Duration::from_millis(50));
    Ok(())
}

/// How many cores had a lock held, by the judge's word.
fn locked(fixture: &Fixture) -> Result<u64> {
    match fs::read(fixture.scratch().join(LOCKED)) {
        Ok(lines) => Ok(lines.len() as u64),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn waiting(fixture: &Fixture) -> Result<usize> {
    let names = fs::read_dir(fixture.scratch())?.flatten();
    let cores = names.filter(|name| name.path().extension().is_some_and(|end| end == "core"));
    Ok(cores.count())
}
