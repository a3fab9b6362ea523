//! A core file of a guest against the guest itself: the same tasks, the same stacks, and no harm done.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use guests::drive::Outpatch;
use serde_json::Value;

use crate::{
    Scenario,
    bench::{Bench, Scratch},
};

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for generation in ["6.1", "6.12"] {
        all.push(Scenario::new(
            format!("dumps::equal_the_paused_guest_{generation}"),
            move |bench| equal(bench, generation),
        ));
    }
    all
}

/// At least this many tasks are compared on each kernel.
const ENOUGH: usize = 50;

fn equal(bench: &Bench, generation: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("guest.core");
    let file = path.to_str().context("a scratch folder in UTF-8")?;
    bench.with(bench.boot(generation, 2, "")?, |guest| {
        let outpatch = guest.outpatch().clone();
        let log = guest.dmesg()?;
        guest.sh("sleeper 24 & sleep 1")?;
        outpatch.ok(&["pause"])?;
        let dump = outpatch.json(&["dump", file])?;
        println!("{generation}: {dump}");
        let line = outpatch.refused(&["dump", file])?;
        ensure!(line.contains("exists"), "{line}");
        let state = outpatch.json(&["status"])?["vm"]["state"].clone();
        ensure!(state == "paused", "after the dump the guest is {state}");

        let tasks = same_tasks(&outpatch, file)?;
        same_stacks(&outpatch, &tasks, file)?;
        println!("{generation}: {} tasks and stacks equal", tasks.len());
        ensure!(tasks.len() >= ENOUGH, "only {} tasks", tasks.len());
        has_symbols(&outpatch, file)?;
        cut_short(&outpatch, &path)?;
        as_qemu_writes_it(&path)?;
        same_tasks(&outpatch, file).context("by QEMU's notes")?;

        outpatch.ok(&["resume"])?;
        guest.sh("true")?;
        guest.expect_unharmed(&log)
    })
}

fn same_tasks(outpatch: &Outpatch, core: &str) -> Result<Vec<Value>> {
    let live = outpatch.json(&["ps"])?;
    let offline = offline(outpatch, &["ps"], core)?;
    ensure!(live == offline, "\nguest {live}\ncore  {offline}");
    Ok(live.as_array().context("ps is no list")?.clone())
}

fn same_stacks(outpatch: &Outpatch, tasks: &[Value], core: &str) -> Result<()> {
    for task in tasks {
        let pid = task["pid"].to_string();
        let live = outpatch.json(&["stack", &pid])?;
        let offline = offline(outpatch, &["stack", &pid], core)?;
        ensure!(live == offline, "\nguest {live}\ncore  {offline}");
    }
    Ok(())
}

fn has_symbols(outpatch: &Outpatch, core: &str) -> Result<()> {
    let reply = outpatch.offline(&["symbols", "--core", core])?;
    ensure!(reply.status == Some(0), "{}", reply.stderr);
    let lines = reply.stdout.lines().count();
    ensure!(lines > 50_000, "only {lines} symbols");
    let schedule = reply
        .stdout
        .lines()
        .any(|line| line.ends_with(" T schedule"));
    ensure!(schedule, "no schedule among {lines} symbols");
    Ok(())
}

/// Half of a core is refused in one line.
fn cut_short(outpatch: &Outpatch, core: &Path) -> Result<()> {
    let half = core.with_extension("half");
    let whole = fs::metadata(core)?.len();
    fs::copy(core, &half)?;
    fs::File::options()
        .write(true)
        .open(&half)?
        .set_len(whole / 2)?;
    let half = half.to_str().context("a path in UTF-8")?;
    for verb in [&["ps"][..], &["stack", "1"], &["symbols"]] {
        let reply = outpatch.offline(&[verb, &["--core", half]].concat())?;
        let line = guests::drive::one_line_refusal("half a core", &reply)?;
        ensure!(line.contains("cut short"), "{line}");
    }
    println!("half a core: refused");
    Ok(())
}

/// Makes our own notes unknown ones, so that only those that QEMU writes too are left.
fn as_qemu_writes_it(core: &Path) -> Result<()> {
    const OURS: &[u8] = b"outpatch\0";
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(core)?;
    let mut head = vec![0; 64 << 10];
    file.read_exact_at(&mut head, 0)?;
    let names = head.windows(OURS.len()).enumerate();
    let names: Vec<usize> = names
        .filter_map(|(at, name)| (name == OURS).then_some(at))
        .collect();
    ensure!(names.len() >= 2, "{} notes of our own", names.len());
    for at in names {
        file.write_all_at(b"x", at as u64)?;
    }
    Ok(())
}

fn offline(outpatch: &Outpatch, verb: &[&str], core: &str) -> Result<Value> {
    let reply = outpatch.offline(&[verb, &["--json", "--core", core]].concat())?;
    ensure!(reply.status == Some(0), "{verb:?}: {}", reply.stderr);
    serde_json::from_str(&reply.stdout).with_context(|| format!("{verb:?} printed no JSON"))
}
