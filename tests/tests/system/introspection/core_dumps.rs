//! A core file of a guest compared with the guest itself: the same tasks, the same stacks, and no
//! effect on the guest.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scratch::Scratch;

/// The minimum number of tasks that must be compared on each kernel.
const MIN_COMPARED: usize = 50;

pub fn equal_the_paused_guest(_: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let path = scratch.path().join("guest.core");
    let file = path.to_str().context("a scratch folder in UTF-8")?;
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
    ensure!(tasks.len() >= MIN_COMPARED, "only {} tasks", tasks.len());
    has_symbols(&outpatch, file)?;
    cut_short(&outpatch, &path)?;

    outpatch.ok(&["resume"])?;
    guest.sh("true")?;
    guest.expect_unharmed(&log)
}

fn same_tasks(outpatch: &Outpatch, core: &str) -> Result<Vec<Value>> {
    let live = outpatch.json(&["ps"])?;
    let offline = outpatch.of_core(&["ps"], core)?;
    ensure!(live == offline, "\nguest {live}\ncore  {offline}");
    Ok(live.as_array().context("ps is no list")?.clone())
}

fn same_stacks(outpatch: &Outpatch, tasks: &[Value], core: &str) -> Result<()> {
    let live = outpatch.json(&["stack"])?;
    let offline = outpatch.of_core(&["stack"], core)?;
    ensure!(live == offline, "\nguest {live}\ncore  {offline}");
    let stacks = live.as_array().context("stack is no list")?;
    let of = |stack: &Value| stack["task"].clone();
    ensure!(stacks.iter().map(of).eq(tasks.iter().cloned()), "{live}");
    // Read one by one they are the same.
    for stack in stacks.iter().step_by(10) {
        let pid = stack["task"]["pid"].to_string();
        let alone = outpatch.of_core(&["stack", &pid], core)?;
        let first = stacks
            .iter()
            .find(|other| other["task"]["pid"] == stack["task"]["pid"]);
        ensure!(Some(&alone) == first, "\nalone {alone}\namong {stack}");
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
