//! `outpatch check`: it reports what applying the module then does, with the guest's own addresses,
//! and changes not a byte of the guest's memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Outpatch, one_line_refusal};
use serde_json::Value;

use crate::harness::fixture::Fixture;
use crate::harness::scratch::Scratch;
use crate::patching::blocked_tasks::{BLOCKERS, list, waiting};
use crate::patching::locks;

/// Patches that apply, and the functions that each replaces.
const GOOD: [(&str, &[&str]); 3] = [
    ("livepatch-sample", &["cmdline_proc_show"]),
    ("getpid", &["__do_sys_getpid"]),
    ("pause", &["__do_sys_pause"]),
];
/// Modules that apply refuses.
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
        expect_addresses(&report, functions, &symbols).with_context(|| report.to_string())?;
    }
    expect_blockers(&outpatch, kernel.patch("pause")?)?;
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
    applies_afterwards(guest, &outpatch, kernel.patch("livepatch-sample")?)?;
    guest.expect_unharmed(&log)
}

fn summary(report: &Value) -> String {
    let len = |at| list(report, at).map_or(0, Vec::len);
    format!(
        "{} functions, {} symbols, code {}, data {}, blocked by {} of {} tasks, stopped {}",
        len("/functions"),
        len("/symbols"),
        report["code"],
        report["data"],
        waiting(report).map_or(0, |tasks| tasks.len()),
        len("/tasks"),
        report["pauses"]
    )
}

/// The addresses of the kernel's own symbols, by name.
fn symbols(outpatch: &Outpatch) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    // These lines equal the guest's /proc/kallsyms, as the scenarios of symbols check.
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

/// Checks that all addresses in the report are those of the guest's symbols.
fn expect_addresses(
    report: &Value,
    functions: &[&str],
    symbols: &BTreeMap<String, BTreeSet<String>>,
) -> Result<()> {
    let names: Vec<&str> = list(report, "/functions")?
        .iter()
        .filter_map(|function| function["name"].as_str())
        .collect();
    ensure!(names == functions, "replaces {names:?}");
    let used = list(report, "/symbols")?;
    ensure!(!used.is_empty(), "a patch that uses no symbol of the guest");
    for found in list(report, "/functions")?.iter().chain(used) {
        let name = found["name"].as_str().context("no name")?;
        let name = match name.strip_prefix(".klp.sym.vmlinux.") {
            Some(klp) => klp.split(',').next().unwrap_or_default(),
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

/// Checks that the tasks that sleep in the function are named, and no others, each with the frame.
fn expect_blockers(outpatch: &Outpatch, patch: &str) -> Result<()> {
    let report = outpatch.json(&["check", patch])?;
    let mut names = BTreeSet::new();
    for task in waiting(&report)? {
        let blocker = task["blocker"].as_str().unwrap_or_default();
        // Another task may just be running. The tasks that sleep in the function block every time.
        if blocker.contains("__do_sys_pause") {
            names.insert(task["comm"].as_str().unwrap_or_default());
        }
    }
    ensure!(names == BTreeSet::from(BLOCKERS), "blocked by {names:?}");
    ensure!(report["at_once"] == false, "{}", report["at_once"]);
    let text = outpatch.ok(&["check", patch])?;
    for name in BLOCKERS {
        let line = text.lines().find(|line| line.contains(name));
        let line = line.with_context(|| format!("no line on {name} in {text}"))?;
        ensure!(line.contains("blocked: in __do_sys_pause+"), "{line}");
    }
    Ok(())
}

/// Checks that the core files of a paused guest before and after are the same, and that a check of
/// the core file reports the same as one of the guest.
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
        "rodata",
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
        "core files of different lengths"
    );
    let mut chunks = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let len = a.read(&mut chunks.0)?;
        if len == 0 {
            return Ok(());
        }
        b.read_exact(&mut chunks.1[..len])?;
        ensure!(
            chunks.0[..len] == chunks.1[..len],
            "the guest's memory changed, at {at:#x} of its core file or after"
        );
        at += len;
    }
}

/// After all this the patch that was checked applies: no trace of the check is left.
fn applies_afterwards(guest: &mut Guest, outpatch: &Outpatch, patch: &str) -> Result<()> {
    const SIGN: &str = "this has been live patched";
    ensure!(
        !guest.sh("cat /proc/cmdline")?.contains(SIGN),
        "a check patched the guest"
    );
    let status = outpatch.json(&["status"])?;
    ensure!(
        status["patches"].as_array().is_some_and(Vec::is_empty),
        "a check left a patch: {status}"
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
