//! Every kind of task in a transition, among a thousand sleepers: each switches as the table in
//! `docs/transition.md` says.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Log, Outpatch, STOLEN_TIME};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::introspection::symbols;
use crate::patching::blocked_tasks::{has_left, times_out};

/// How many sleepers there are besides the other tasks. One of ten is in pause(2) itself, two of
/// ten have another task in pause(2) with them.
const SLEEPERS: u32 = 1000;
/// The minimum number of kernel threads.
const MIN_KTHREADS: usize = 50;
/// How lines of the log begin that report a CPU going offline or online.
const HOTPLUG: [&str; 2] = ["smpboot: ", "x86: Booting SMP configuration"];
/// How long the tasks may take to start.
const START: Duration = Duration::from_secs(180);
/// How long a transition may take once nothing blocks it, in seconds.
const UNBLOCKED_SECONDS: u64 = 120;
const UNBLOCKED_LIMIT: Duration = Duration::from_secs(UNBLOCKED_SECONDS);

/// The tasks of the program `kinds` that sleep in pause(2), a function of the patch, where the fake
/// signal wakes them.
const INTERRUPTIBLE: [&str; 4] = ["k-pause", "k-clone", "k-namespace", "k-vforked"];
/// The task in vfork(2), a function of the patch too, where it does not.
const UNINTERRUPTIBLE: &str = "k-vfork";
/// The sleepers of the program `sleeper` in pause(2).
const PAUSING: [&str; 3] = ["sleep-pause", "sleep-thread", "sleep-waited"];

/// How the names of workers of io_uring and of vhost begin, before the ID of the task that they
/// work for.
const WORKERS: [&str; 2] = ["iou-wrk-", VHOST];
const VHOST: &str = "vhost-";

/// What each task may be switched by before any task is signalled.
const SWITCHED_BY: [(&str, &[&str]); 15] = [
    ("k-user", &["user-mode", "kernel-exit", "stack"]),
    ("k-kernel", &["kernel-exit", "stack", "user-mode"]),
    ("k-stopped", &["stack"]),
    ("k-traced", &["stack"]),
    ("k-tracer", &["stack"]),
    ("k-frozen", &["stack"]),
    ("k-zombie", &["stack"]),
    ("k-parent", &["stack"]),
    ("k-clones", &["stack"]),
    ("k-io", &["stack"]),
    ("k-vhost", &["stack"]),
    ("sleep-read", &["stack"]),
    ("sleep-nano", &["stack"]),
    ("sleep-futex", &["stack"]),
    ("sleep-epoll", &["stack"]),
];

pub fn scenarios() -> Vec<Scenario> {
    let cases = ["6.1", "6.12", "7.3"].map(|generation| [(generation, 2), (generation, 4)]);
    let scenario = |(generation, cpus)| {
        let name = format!("task_kinds::as_documented_{generation}_{cpus}_vcpus");
        let run = move |fixture: &Fixture| kinds(fixture, generation, cpus);
        Scenario::new(name, run).extra_if((generation, cpus) != ("7.3", 4))
    };
    cases.into_iter().flatten().map(scenario).collect()
}

fn kinds(fixture: &Fixture, generation: &str, cpus: u32) -> Result<()> {
    let patch = fixture.kernel(generation)?.patch("kinds")?;
    fixture.with(fixture.boot(generation, cpus, "")?, |guest| {
        let outpatch = guest.outpatch().clone();
        symbols::load_modules(guest)?;
        let log = guest.dmesg()?;
        start(guest)?;

        times_out(&outpatch, &["apply", patch, "--timeout", "5"])?;
        let log = unplug_and_plug(guest, cpus, &log)?;
        let before = Tasks::of(&outpatch, "kinds")?;
        before.as_documented(generation)?;
        before.blocked_are(&[&INTERRUPTIBLE[..], &PAUSING, &[UNINTERRUPTIBLE]].concat())?;

        outpatch.ok(&["signal"])?;
        let signalled = until_only(&outpatch, UNINTERRUPTIBLE)?;
        signalled.switched_by_signal()?;
        let stays = signalled.one(UNINTERRUPTIBLE)?;
        ensure!(stays["state"] == "D", "{stays}");

        // The child that it waits for ends, and it switches on exit to user mode, or in a pause on
        // its way there.
        guest.sh("kill -9 $(grep -l '^k-vforked$' /proc/[0-9]*/comm | sed 's/[^0-9]//g')")?;
        let status = outpatch.json(&["status", "kinds"])?;
        guest.rest().wait_complete(status, UNBLOCKED_LIMIT)?;
        let completed = Tasks::of(&outpatch, "kinds")?;
        let parent = completed.one(UNINTERRUPTIBLE)?;
        ensure!(has_left(parent), "{parent}");
        println!("{generation}, {cpus} vCPUs: {}", completed.summary());
        let states = guest.sh("cat /proc/[0-9]*/task/[0-9]*/patch_state | sort | uniq")?;
        ensure!(states == "-1", "tasks still have a patch state: {states}");

        let limit = UNBLOCKED_SECONDS.to_string();
        outpatch.ok(&["revert", "--signal-after", "0", "--timeout", &limit])?;
        let kernel = fixture.kernel(generation)?;
        main_loop(
            &outpatch,
            kernel.patch("kthread")?,
            "oom_reaper",
            "oom_reaper+",
        )?;
        if worker_of_vhost(generation) == "worker" {
            main_loop(&outpatch, kernel.patch("worker")?, VHOST, "vhost_task_fn+")?;
        }
        vhost_worker_ends(guest, &completed)?;
        guest.expect_unharmed(&log)
    })
}

/// Starts all tasks, and waits until each sleeps where it should.
fn start(guest: &mut Guest) -> Result<()> {
    let wait = |guest: &mut Guest, what, until: &str| {
        let wait = format!("until {until}; do sleep 2; done 2>/dev/null");
        guest.sh_within(&wait, START).context(what).map(drop)
    };
    // All sleepers before the busy tasks start: a task that is forked in the transition would be
    // reported as such. One of ten has a child.
    guest.sh(&format!("sleeper {SLEEPERS} &"))?;
    let all = SLEEPERS / 10 * 11;
    let named = format!("[ $(cat /proc/[0-9]*/comm | grep -c '^sleep-') -ge {all} ]");
    wait(guest, "sleepers", &named)?;
    // The shell that checks them must not wait for the busy ones.
    guest.sh("kinds & renice -n -20 -p $$; sleep 1")?;
    for worker in WORKERS {
        let is_there = format!("cat /proc/[0-9]*/task/[0-9]*/comm | grep -q ^{worker}");
        wait(guest, worker, &is_there)?;
    }
    guest.sh(
        "mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/cold
for p in $(grep -l '^k-frozen$' /proc/[0-9]*/comm | sed 's/[^0-9]//g'); do
  echo $p > /sys/fs/cgroup/cold/cgroup.procs
done
echo 1 > /sys/fs/cgroup/cold/cgroup.freeze
until grep -q 'frozen 1' /sys/fs/cgroup/cold/cgroup.events; do sleep 0.1; done; sleep 2",
    )?;
    Ok(())
}

/// Takes the last CPU offline and online again. The kernel reports this in its log, and nothing
/// else.
fn unplug_and_plug(guest: &mut Guest, cpus: u32, before: &Log) -> Result<Log> {
    let cpu = format!("/sys/devices/system/cpu/cpu{}/online", cpus - 1);
    guest.sh(&format!("echo 0 > {cpu}; sleep 1; echo 1 > {cpu}"))?;
    ensure!(
        guest.sh(&format!("cat {cpu}"))? == "1",
        "the CPU is offline"
    );
    let log = guest.dmesg()?;
    for line in guest.dmesg_since(before)? {
        let expected = HOTPLUG.iter().chain(&STOLEN_TIME);
        ensure!(
            expected.into_iter().any(|words| line.starts_with(words)),
            "in the guest's log: {line}"
        );
    }
    Ok(log)
}

/// The kind of a vhost worker: since 6.4 it is a thread of the task that it works for.
fn worker_of_vhost(generation: &str) -> &'static str {
    match generation {
        "6.1" => "kthread",
        _ => "worker",
    }
}

/// Checks that the worker of vhost ends when the task that it works for ends.
fn vhost_worker_ends(guest: &mut Guest, tasks: &Tasks) -> Result<()> {
    let owner = &tasks.one("k-vhost")?["pid"];
    let worker = &tasks.with_prefix(VHOST)?["pid"];
    guest.sh(&format!(
        "kill -9 {owner}; while [ -e /proc/{worker} ]; do sleep 0.1; done"
    ))?;
    Ok(())
}

/// A task that never leaves the patched function, its main loop: it is named, signalled and woken
/// on request, and keeps its state.
fn main_loop(outpatch: &Outpatch, patch: &str, prefix: &str, function: &str) -> Result<()> {
    let arguments = ["apply", patch, "--signal-after", "0", "--timeout", "3"];
    times_out(outpatch, &arguments)?;
    let name = Path::new(patch).file_stem().context(patch.to_owned())?;
    let tasks = Tasks::of(outpatch, &name.to_string_lossy())?;
    let one = tasks.with_prefix(prefix)?;
    let waiting = tasks.waiting();
    let comm = one["comm"].as_str().unwrap_or_default();
    ensure!(waiting.keys().eq([&comm]), "{waiting:?}");
    let blocker = one["blocker"].as_str().unwrap_or_default();
    ensure!(blocker.contains(function), "{one}");
    ensure!(one["signals"].as_u64() > Some(0), "it was not woken: {one}");
    outpatch.ok(&["cancel"]).map(drop)
}

/// Waits until no tasks but those of this name keep the old state.
fn until_only(outpatch: &Outpatch, comm: &str) -> Result<Tasks> {
    let started = std::time::Instant::now();
    loop {
        let tasks = Tasks::of(outpatch, "kinds")?;
        let waiting = tasks.waiting();
        if waiting.keys().eq([&comm]) {
            return Ok(tasks);
        }
        ensure!(
            started.elapsed() < UNBLOCKED_LIMIT,
            "these wait: {waiting:?}"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// The tasks of a transition, as the status reports them.
struct Tasks(Vec<Value>);

impl Tasks {
    fn of(outpatch: &Outpatch, patch: &str) -> Result<Tasks> {
        let status = outpatch.json(&["status", patch])?;
        let tasks = status["tasks"].as_array().context("no tasks")?;
        Ok(Tasks(tasks.clone()))
    }

    fn named<'t>(&'t self, comm: &'t str) -> impl Iterator<Item = &'t Value> {
        self.0.iter().filter(move |task| task["comm"] == comm)
    }

    fn one<'t>(&'t self, comm: &'t str) -> Result<&'t Value> {
        self.named(comm)
            .next()
            .with_context(|| format!("no {comm} among the tasks"))
    }

    /// The first task whose name starts with this.
    fn with_prefix(&self, prefix: &str) -> Result<&Value> {
        let mut tasks = self.0.iter();
        let matches = |task: &&Value| {
            let comm = task["comm"].as_str();
            comm.is_some_and(|comm| comm.starts_with(prefix))
        };
        (tasks.find(matches)).with_context(|| format!("no {prefix} among the tasks"))
    }

    /// How many tasks of each name keep the old state.
    fn waiting(&self) -> BTreeMap<&str, usize> {
        let mut waiting = BTreeMap::new();
        for task in self.0.iter().filter(|task| task["switched_by"].is_null()) {
            *waiting
                .entry(task["comm"].as_str().unwrap_or_default())
                .or_default() += 1;
        }
        waiting
    }

    /// Checks what each task was switched by, before any task is signalled.
    fn as_documented(&self, generation: &str) -> Result<()> {
        for (comm, allowed) in SWITCHED_BY {
            let mut tasks = self.named(comm).peekable();
            ensure!(tasks.peek().is_some(), "no {comm} among the tasks");
            for task in tasks {
                let switched_by = task["switched_by"].as_str().unwrap_or_default();
                ensure!(allowed.contains(&switched_by), "{task}");
            }
        }
        let kind = |kind: &'static str| self.0.iter().filter(move |task| task["kind"] == kind);
        let kthreads = kind("kthread").count();
        ensure!(kthreads >= MIN_KTHREADS, "only {kthreads} kthreads");
        for kthread in kind("kthread") {
            let switched_by = kthread["switched_by"].as_str().unwrap_or_default();
            let allowed = ["stack", "forked", "exited"];
            ensure!(allowed.contains(&switched_by), "{kthread}");
        }
        for (prefix, kind) in WORKERS
            .into_iter()
            .zip(["worker", worker_of_vhost(generation)])
        {
            let worker = self.with_prefix(prefix)?;
            ensure!(worker["kind"] == kind, "{worker}");
            ensure!(worker["switched_by"] == "stack", "{worker}");
        }
        for worker in kind("worker") {
            ensure!(worker["switched_by"] == "stack", "{worker}");
        }
        for idle in kind("idle") {
            let switched_by = idle["switched_by"].as_str().unwrap_or_default();
            let allowed = ["stack", "idle", "forked"];
            ensure!(allowed.contains(&switched_by), "{idle}");
        }
        // A process that forks all the time, and its children.
        let mut forked = self.named("k-forking");
        ensure!(
            forked.any(|task| task["switched_by"] == "forked"),
            "no task was forked in the transition"
        );
        Ok(())
    }

    /// Checks that exactly these tasks wait, each with its frame and its state.
    fn blocked_are(&self, comms: &[&str]) -> Result<()> {
        let waiting: Vec<&str> = self.waiting().into_keys().collect();
        let mut expected = comms.to_vec();
        expected.sort_unstable();
        ensure!(waiting == expected, "these wait: {waiting:?}");
        for task in self.0.iter().filter(|task| task["switched_by"].is_null()) {
            let vfork = task["comm"] == UNINTERRUPTIBLE;
            let function = if vfork {
                "__do_sys_vfork+"
            } else {
                "__do_sys_pause+"
            };
            let blocker = task["blocker"].as_str().unwrap_or_default();
            ensure!(blocker.contains(function), "{task}");
            ensure!(task["state"] == if vfork { "D" } else { "S" }, "{task}");
            ensure!(task["signals"] == 0, "{task}");
        }
        Ok(())
    }

    /// Checks that all tasks that slept interruptibly switched once they were signalled: on exit to
    /// user mode, or a few by their stack, in a pause on their way there. No other task was
    /// signalled.
    fn switched_by_signal(&self) -> Result<()> {
        let (mut kernel_exit, mut stack) = (0, 0);
        for task in &self.0 {
            let comm = task["comm"].as_str().unwrap_or_default();
            let signals = task["signals"].as_u64().context("no signals")?;
            let in_pause = INTERRUPTIBLE.contains(&comm) || PAUSING.contains(&comm);
            ensure!(
                in_pause == (signals > 0) || comm == UNINTERRUPTIBLE,
                "{task}"
            );
            match task["switched_by"].as_str() {
                Some("kernel-exit") if in_pause => kernel_exit += 1,
                Some("stack") if in_pause => stack += 1,
                other => ensure!(!in_pause, "{other:?}: {task}"),
            }
        }
        println!("signalled: {kernel_exit} switched on kernel exit, {stack} by their stack");
        ensure!(kernel_exit > stack, "most switched by their stack");
        Ok(())
    }

    fn summary(&self) -> String {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for task in &self.0 {
            *counts
                .entry(format!("{} {}", task["kind"], task["switched_by"]).replace('"', ""))
                .or_default() += 1;
        }
        format!("{} tasks: {counts:?}", self.0.len())
    }
}
