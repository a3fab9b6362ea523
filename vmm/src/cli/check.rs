//! `outpatch check`.

use std::path::Path;

use patcher::{AllocationReport, CheckReport};

use crate::cli::commands::VerbError;
use crate::cli::output::{Output, Tone};
use crate::cli::progress::{pauses, task_line, ways};
use crate::cli::source::GuestSource;

/// Says what applying `file` would come to.
pub fn check(
    guest: &mut GuestSource,
    file: &Path,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let report = guest.check(file)?;
    if json {
        return Ok(screen.json(&report)?);
    }
    for function in &report.functions {
        let line = format!(
            "{}:{},{} at {}, {} bytes",
            function.object, function.name, function.sympos, function.address, function.size
        );
        screen.line(Tone::Plain, &line)?;
    }
    for symbol in &report.symbols {
        screen.line(
            Tone::Plain,
            &format!("uses {} at {}", symbol.name, symbol.address),
        )?;
    }
    screen.line(Tone::Plain, &place("code", &report.code))?;
    if let Some(data) = &report.data {
        screen.line(Tone::Plain, &place("data", data))?;
    }
    for task in report
        .tasks
        .iter()
        .filter(|task| task.switched_by.is_none())
    {
        screen.line(Tone::Busy, &task_line(task))?;
    }
    Ok(screen.line(Tone::Good, &summary(&report))?)
}

fn place(what: &str, piece: &AllocationReport) -> String {
    let place = if piece.hidden {
        "hidden memory"
    } else {
        "the padding of the kernel's text"
    };
    format!(
        "{what}: {} bytes at {}, in {place}",
        piece.bytes, piece.address
    )
}

/// `fix: would apply; tasks that would switch at once: 40 by their stack; in the way now: 1; guest stopped 1 time, …`.
fn summary(report: &CheckReport) -> String {
    let mut parts = vec![format!("{}: would apply", report.name)];
    let ways = ways(&report.tasks);
    if !ways.is_empty() {
        parts.push(format!("tasks that would switch at once: {ways}"));
    }
    let waiting = report
        .tasks
        .iter()
        .filter(|task| task.switched_by.is_none())
        .count();
    parts.push(match (waiting, report.at_once) {
        (0, true) => "nobody is in the way".to_owned(),
        (0, false) => "a vCPU is between two tasks now".to_owned(),
        (count, _) => format!("in the way now: {count}"),
    });
    parts.push(format!("guest stopped {}", pauses(&report.pauses)));
    parts.join("; ")
}
