//! Every kind of task in a transition, among a thousand sleepers: each ends as the table in `docs/transition.md` says.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Log, Outpatch, STOLEN_TIME};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::introspection::symbols;

/// Sleepers beside the others; one of ten is in pause(2) itself, two of ten have one in pause(2) with them.
const SLEEPERS: u32 = 1000;
/// The kernel's own threads, at the least.
const KTHREADS: usize = 50;
/// How lines of the log begin that tell of a CPU that goes or comes.
const HOTPLUG: [&str; 2] = ["smpboot: ", "x86: Booting SMP configuration"];
/// How long so many take to start.
const START: Duration = Duration::from_secs(180);
/// How long a transition may take in which nothing is in the way any more.
const SOON: &str = "120";
/// The same, for who waits here.
const GETS_ON: Duration = Duration::from_secs(120);
/// Exit status of the command line when the transition goes on.
const TIMED_OUT: i32 = 4;

/// Those of the program `kinds` that sleep in the functions of the patch: in pause(2), where the fake signal reaches them.
const INTERRUPTIBLE: [&str; 4] = ["k-pause", "k-clone", "k-namespace", "k-vforked"];
/// In vfork(2), where it does not.
const UNINTERRUPTIBLE: &str = "k-vfork";
/// Sleepers of the program `sleeper` in pause(2).
const PAUSING: [&str; 3] = ["sleep-pause", "sleep-thread", "sleep-waited"];

/// How workers of io_uring and of vhost are named, before the id of whom they work for.
const WORKERS: [&str; 2] = ["iou-wrk-", VHOST];
const VHOST: &str = "vhost-";

/// Who may go which way before anybody is signalled.
const WAYS: [(&str, &[&str]); 15] = [
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

        let reply = outpatch.call(&["apply", patch, "--timeout", "5"])?;
        ensure!(reply.status == Some(TIMED_OUT), "{reply:?}");
        let log = unplug_and_plug(guest, cpus, &log)?;
        let before = Tasks::of(&outpatch, "kinds")?;
        before.as_documented(generation)?;
        before.blocked_are(&[&INTERRUPTIBLE[..], &PAUSING, &[UNINTERRUPTIBLE]].concat())?;

        outpatch.ok(&["signal"])?;
        let signalled = until_only(&outpatch, UNINTERRUPTIBLE)?;
        signalled.moved_by_signal()?;
        let stays = signalled.one(UNINTERRUPTIBLE)?;
        ensure!(stays["state"] == "D", "{stays}");

        // What it waits for ends, and it comes by the boundary, or is met on the way there.
        guest.sh("kill -9 $(pidof_comm() { grep -l \"^$1$\" /proc/[0-9]*/comm | sed 's/[^0-9]//g'; }; pidof_comm k-vforked)")?;
        let status = outpatch.json(&["status", "kinds"])?;
        guest.rest().end(status, GETS_ON)?;
        let over = Tasks::of(&outpatch, "kinds")?;
        let moved = over.one(UNINTERRUPTIBLE)?;
        ensure!(moved["switched_by"] == "kernel-exit" || moved["switched_by"] == "stack", "{moved}");
        println!("{generation}, {cpus} vCPUs: {}", over.summary());
        let states = guest.sh("cat /proc/[0-9]*/task/[0-9]*/patch_state | sort | uniq")?;
        ensure!(states == "-1", "states are left: {states}");

        outpatch.ok(&["revert", "--signal-after", "0", "--timeout", SOON])?;
        let kernel = fixture.kernel(generation)?;
        main_loop(&outpatch, kernel.patch("kthread")?, "oom_reaper", "oom_reaper+")?;
        if worker_of_vhost(generation) == "worker" {
            main_loop(&outpatch, kernel.patch("worker")?, VHOST, "vhost_task_fn+")?;
        }
        vhost_still_serves(guest, &over)?;
        guest.expect_unharmed(&log)
    })
}

/// All of them, at their places.
fn start(guest: &mut Guest) -> Result<()> {
    let wait = |guest: &mut Guest, what, until: &str| {
        let wait = format!("until {until}; do sleep 2; done 2>/dev/null");
        guest.sh_within(&wait, START).context(what).map(drop)
    };
    // All of them before the busy ones begin: who is born in the transition has no way to go. One of ten has a child.
    guest.sh(&format!("sleeper {SLEEPERS} &"))?;
    let all = SLEEPERS / 10 * 11;
    let named = format!("[ $(cat /proc/[0-9]*/comm | grep -c '^sleep-') -ge {all} ]");
    wait(guest, "sleepers", &named)?;
    // What looks at them is not to wait for the busy ones.
    guest.sh("kinds & renice -n -20 -p $$; sleep 1")?;
    for worker in WORKERS {
        let is_there = format!("cat /proc/[0-9]*/task/[0-9]*/comm | grep -q ^{worker}");
        wait(guest, worker, &is_there)?;
    }
    guest.sh(
        "mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && mkdir /sys/fs/cgroup/cold
for p in $(grep -l '^k-frozen$' /proc/[0-9]*/comm | sed 's/[^0-9]//g'); do echo $p > /sys/fs/cgroup/cold/cgroup.procs; done
echo 1 > /sys/fs/cgroup/cold/cgroup.freeze
until grep -q 'frozen 1' /sys/fs/cgroup/cold/cgroup.events; do sleep 0.1; done; sleep 2",
    )?;
    Ok(())
}

/// The last CPU goes and comes back, of which the kernel says so in its log, and nothing else.
fn unplug_and_plug(guest: &mut Guest, cpus: u32, before: &Log) -> Result<Log> {
    let cpu = format!("/sys/devices/system/cpu/cpu{}/online", cpus - 1);
    guest.sh(&format!("echo 0 > {cpu}; sleep 1; echo 1 > {cpu}"))?;
    ensure!(guest.sh(&format!("cat {cpu}"))? == "1", "the CPU is off");
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

/// What a worker of vhost is to the kernel: threads of whom they work for came with 6.4.
fn worker_of_vhost(generation: &str) -> &'static str {
    match generation {
        "6.1" => "kthread",
        _ => "worker",
    }
}

/// Its worker goes when whom it is for goes.
fn vhost_still_serves(guest: &mut Guest, tasks: &Tasks) -> Result<()> {
    let owner = &tasks.one("k-vhost")?["pid"];
    let worker = &tasks.beginning(VHOST)?["pid"];
    guest.sh(&format!(
        "kill -9 {owner}; while [ -e /proc/{worker} ]; do sleep 0.1; done"
    ))?;
    Ok(())
}

/// One that never leaves the function: it is named, told and woken when that is asked for, and stays.
fn main_loop(outpatch: &Outpatch, patch: &str, begins: &str, function: &str) -> Result<()> {
    let reply = outpatch.call(&["apply", patch, "--signal-after", "0", "--timeout", "3"])?;
    ensure!(reply.status == Some(TIMED_OUT), "{reply:?}");
    let name = Path::new(patch).file_stem().context(patch.to_owned())?;
    let tasks = Tasks::of(outpatch, &name.to_string_lossy())?;
    let one = tasks.beginning(begins)?;
    let waiting = tasks.waiting();
    let comm = one["comm"].as_str().unwrap_or_default();
    ensure!(waiting.keys().eq([&comm]), "{waiting:?}");
    let blocker = one["blocker"].as_str().unwrap_or_default();
    ensure!(blocker.contains(function), "{one}");
    ensure!(one["signals"].as_u64() > Some(0), "it was not woken: {one}");
    outpatch.ok(&["cancel"]).map(drop)
}

/// Waits until nobody but tasks of this name keep the old state.
fn until_only(outpatch: &Outpatch, comm: &str) -> Result<Tasks> {
    let started = std::time::Instant::now();
    loop {
        let tasks = Tasks::of(outpatch, "kinds")?;
        let waiting = tasks.waiting();
        if waiting.keys().eq([&comm]) {
            return Ok(tasks);
        }
        ensure!(started.elapsed() < GETS_ON, "these wait: {waiting:?}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Every task's part in the transition.
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

    /// The first whose name begins so.
    fn beginning(&self, begins: &str) -> Result<&Value> {
        let mut tasks = self.0.iter();
        let is_it = |task: &&Value| {
            let comm = task["comm"].as_str();
            comm.is_some_and(|comm| comm.starts_with(begins))
        };
        (tasks.find(is_it)).with_context(|| format!("no {begins} among the tasks"))
    }

    /// How many of each name keep the old state.
    fn waiting(&self) -> BTreeMap<&str, usize> {
        let mut waiting = BTreeMap::new();
        for task in self.0.iter().filter(|task| task["switched_by"].is_null()) {
            *waiting
                .entry(task["comm"].as_str().unwrap_or_default())
                .or_default() += 1;
        }
        waiting
    }

    fn as_documented(&self, generation: &str) -> Result<()> {
        for (comm, ways) in WAYS {
            let mut tasks = self.named(comm).peekable();
            ensure!(tasks.peek().is_some(), "no {comm} among the tasks");
            for task in tasks {
                let way = task["switched_by"].as_str().unwrap_or_default();
                ensure!(ways.contains(&way), "{task}");
            }
        }
        let kind = |kind: &'static str| self.0.iter().filter(move |task| task["kind"] == kind);
        let kthreads = kind("kthread").count();
        ensure!(kthreads >= KTHREADS, "only {kthreads} kthreads");
        for kthread in kind("kthread") {
            let way = kthread["switched_by"].as_str().unwrap_or_default();
            ensure!(["stack", "forked", "exited"].contains(&way), "{kthread}");
        }
        for (begins, kind) in WORKERS
            .into_iter()
            .zip(["worker", worker_of_vhost(generation)])
        {
            let worker = self.beginning(begins)?;
            ensure!(worker["kind"] == kind, "{worker}");
            ensure!(worker["switched_by"] == "stack", "{worker}");
        }
        for worker in kind("worker") {
            ensure!(worker["switched_by"] == "stack", "{worker}");
        }
        for idle in kind("idle") {
            let way = idle["switched_by"].as_str().unwrap_or_default();
            ensure!(["stack", "idle", "forked"].contains(&way), "{idle}");
        }
        // A process that forks all the time, and its children.
        let mut forked = self.named("k-forking");
        ensure!(
            forked.any(|task| task["switched_by"] == "forked"),
            "nobody was born in the transition"
        );
        Ok(())
    }

    /// Exactly these wait, each with its frame and its state.
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

    /// All that slept interruptibly moved once they were signalled: by the boundary, or a few by their stack, where a pause came
    /// while they were on the way there. Nobody else was signalled.
    fn moved_by_signal(&self) -> Result<()> {
        let (mut boundary, mut stack) = (0, 0);
        for task in &self.0 {
            let comm = task["comm"].as_str().unwrap_or_default();
            let signals = task["signals"].as_u64().context("no signals")?;
            let in_pause = INTERRUPTIBLE.contains(&comm) || PAUSING.contains(&comm);
            ensure!(
                in_pause == (signals > 0) || comm == UNINTERRUPTIBLE,
                "{task}"
            );
            match task["switched_by"].as_str() {
                Some("kernel-exit") if in_pause => boundary += 1,
                Some("stack") if in_pause => stack += 1,
                way => ensure!(!in_pause, "{way:?}: {task}"),
            }
        }
        println!("signalled: {boundary} came by the boundary, {stack} were met on the way");
        ensure!(boundary > stack, "most were met on the way");
        Ok(())
    }

    fn summary(&self) -> String {
        let mut ways: BTreeMap<String, usize> = BTreeMap::new();
        for task in &self.0 {
            *ways
                .entry(format!("{} {}", task["kind"], task["switched_by"]).replace('"', ""))
                .or_default() += 1;
        }
        format!("{} tasks: {ways:?}", self.0.len())
    }
}
