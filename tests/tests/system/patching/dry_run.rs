//! `outpatch check` against what applying then does, against the guest's own symbols, and against the guest's memory: not a byte of
//! it changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch, one_line_refusal};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scratch::Scratch;
use crate::patching::blocked_tasks::BLOCKERS;
use crate::patching::locks;

/// Good patches, and functions that each replaces.
const GOOD: [(&str, &[&str]); 3] = [
    ("livepatch-sample", &["cmdline_proc_show"]),
    ("getpid", &["__do_sys_getpid"]),
    ("pause", &["__do_sys_pause"]),
];
/// What apply refuses.
const BAD: [&str; 6] = [
    "not-livepatch",
    "unknown-function",
    "unknown-symbol",
    "wrong-sympos",
    "percpu",
    "module-object",
];

pub fn predicts_apply(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let outpatch = guest.outpatch().clone();
    let log = guest.dmesg()?;
    guest.sh("sleeper 10 & sleep 1")?;
    let symbols = symbols(&outpatch)?;
    for (name, functions) in GOOD {
        let report = outpatch.json(&["check", kernel.patch(name)?])?;
        println!("{generation}: {name}: {}", summary(&report));
        addresses_are_the_guests(&report, functions, &symbols)
            .with_context(|| report.to_string())?;
    }
    blockers_are_named(&outpatch, kernel.patch("pause")?)?;
    for name in BAD {
        let file = kernel.patch(name)?;
        let applied = outpatch.refused(&["apply", file])?;
        let checked = outpatch.refused(&["check", file])?;
        ensure!(
            checked == applied,
            "{name}: apply says {applied:?}, check {checked:?}"
        );
    }
    nothing_is_written(&outpatch, kernel.patch("pause")?, kernel.patch(BAD[1])?)?;
    as_applied(guest, &outpatch, kernel.patch("livepatch-sample")?)?;
    guest.expect_unharmed(&log)
}

fn summary(report: &Value) -> String {
    let waiting = list(report, "tasks").map_or(0, |tasks| {
        tasks
            .iter()
            .filter(|task| task["switched_by"].is_null())
            .count()
    });
    format!(
        "{} functions, {} symbols, code {}, data {}, {} of {} tasks in the way, stopped {}",
        list(report, "functions").map_or(0, Vec::len),
        list(report, "symbols").map_or(0, Vec::len),
        report["code"],
        report["data"],
        waiting,
        list(report, "tasks").map_or(0, Vec::len),
        report["pauses"]
    )
}

fn list<'v>(value: &'v Value, at: &str) -> Result<&'v Vec<Value>> {
    value[at]
        .as_array()
        .with_context(|| format!("{at} is no list in {value}"))
}

/// Addresses by name, of the kernel's own symbols.
fn symbols(outpatch: &Outpatch) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    // These lines are the guest's /proc/kallsyms: the scenarios of symbols see to that.
    for line in outpatch.ok(&["symbols"])?.lines() {
        let mut words = line.split_whitespace();
        if let (Some(address), Some(_), Some(name), None) =
            (words.next(), words.next(), words.next(), words.next())
        {
            found
                .entry(name.to_owned())
                .or_default()
                .insert(format!("0x{address}"));
        }
    }
    ensure!(found.len() > 50_000, "only {} symbols", found.len());
    Ok(found)
}

fn addresses_are_the_guests(
    report: &Value,
    functions: &[&str],
    symbols: &BTreeMap<String, BTreeSet<String>>,
) -> Result<()> {
    let names: Vec<&str> = list(report, "functions")?
        .iter()
        .filter_map(|function| function["name"].as_str())
        .collect();
    ensure!(names == functions, "replaces {names:?}");
    let used = list(report, "symbols")?;
    ensure!(!used.is_empty(), "a patch that uses nothing of the guest");
    for found in list(report, "functions")?.iter().chain(used) {
        let name = found["name"].as_str().context("no name")?;
        let name = match name.strip_prefix(".klp.sym.vmlinux.") {
            Some(late) => late.split(',').next().unwrap_or_default(),
            None => name,
        };
        let address = found["address"].as_str().context("no address")?;
        ensure!(
            symbols
                .get(name)
                .is_some_and(|known| known.contains(address)),
            "{name} is not at {address}"
        );
    }
    Ok(())
}

/// The tasks that sleep in the function, and no others, each with the frame.
fn blockers_are_named(outpatch: &Outpatch, patch: &str) -> Result<()> {
    let report = outpatch.json(&["check", patch])?;
    let waiting = list(&report, "tasks")?
        .iter()
        .filter(|t| t["switched_by"].is_null());
    let mut names = BTreeSet::new();
    for task in waiting {
        let blocker = task["blocker"].as_str().unwrap_or_default();
        // Somebody may just be running; who sleeps in the function is in the way in every look.
        if blocker.contains("__do_sys_pause") {
            names.insert(task["comm"].as_str().unwrap_or_default());
        }
    }
    ensure!(names == BTreeSet::from(BLOCKERS), "in the way: {names:?}");
    ensure!(report["at_once"] == false, "{}", report["at_once"]);
    let text = outpatch.ok(&["check", patch])?;
    for name in BLOCKERS {
        let line = text.lines().find(|line| line.contains(name));
        let line = line.with_context(|| format!("no line on {name} in {text}"))?;
        ensure!(line.contains("in the way: in __do_sys_pause+"), "{line}");
    }
    Ok(())
}

/// Of a paused guest a core before and one after are the same, and say the same.
fn nothing_is_written(outpatch: &Outpatch, good: &str, bad: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let (before, after) = (scratch.path().join("before"), scratch.path().join("after"));
    let core = before.to_str().context("a scratch folder in UTF-8")?;
    outpatch.ok(&["pause"])?;
    outpatch.ok(&["dump", core])?;
    let live = outpatch.json(&["check", good])?;
    let refused = outpatch.refused(&["check", bad])?;
    outpatch.ok(&["dump", after.to_str().context("a scratch folder in UTF-8")?])?;
    outpatch.ok(&["resume"])?;
    same_bytes(&before, &after)?;
    locks::changes_report_busy(&before, &fs::read(good)?)?;

    let offline = outpatch.of_core(&["check", good], core)?;
    for part in [
        "name",
        "functions",
        "symbols",
        "code",
        "data",
        "tasks",
        "at_once",
    ] {
        ensure!(
            live[part] == offline[part],
            "{part}:\nguest {}\ncore  {}",
            live[part],
            offline[part]
        );
    }
    let reply = outpatch.offline(&["check", "--core", core, bad])?;
    let line = one_line_refusal("a bad patch for a core", &reply)?;
    let function = "outpatch_no_such_function";
    ensure!(
        line.contains(function) && refused.contains(function),
        "{line:?} and {refused:?}"
    );
    Ok(())
}

fn same_bytes(one: &Path, other: &Path) -> Result<()> {
    let (mut a, mut b) = (File::open(one)?, File::open(other)?);
    ensure!(
        a.metadata()?.len() == b.metadata()?.len(),
        "cores of two lengths"
    );
    let mut pieces = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let len = a.read(&mut pieces.0)?;
        if len == 0 {
            return Ok(());
        }
        b.read_exact(&mut pieces.1[..len])?;
        ensure!(
            pieces.0[..len] == pieces.1[..len],
            "the guest's memory changed, at {at:#x} of its core or behind"
        );
        at += len;
    }
}

/// After all this the patch that was checked goes in, with no trace of the check in its way.
fn as_applied(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    const SIGN: &str = "this has been live patched";
    ensure!(
        !guest.sh("cat /proc/cmdline")?.contains(SIGN),
        "a check patched the guest"
    );
    let status = outpatch.json(&["status"])?;
    ensure!(
        status["patches"].as_array().is_some_and(Vec::is_empty),
        "a check left something: {status}"
    );
    outpatch.ok(&["apply", patch])?;
    ensure!(
        guest.sh("cat /proc/cmdline")?.contains(SIGN),
        "the patch has no effect"
    );
    let line = outpatch.refused(&["check", patch])?;
    ensure!(line.contains("already"), "{line}");
    outpatch.ok(&["revert"])?;
    outpatch.ok(&["check", patch])?;
    Ok(())
}
