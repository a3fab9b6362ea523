//! `outpatch check`: whether a module would apply, and which tasks would delay it.

use std::path::Path;

use patcher::{AllocationReport, CheckReport};

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};
use crate::cli::source::GuestSource;
use crate::cli::summary::{count_of, pauses, pending, switched, task_lines};

/// Shows what applying `file` would do: the functions that it would replace, its memory, the tasks
/// that would block the transition, and a summary; when `verbose` also the symbols that it uses,
/// and every task.
pub fn check(
    guest: &mut GuestSource,
    file: &Path,
    verbose: bool,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let report = guest.check(file)?;
    if json {
        return Ok(output.json(&report)?);
    }
    let functions = report.functions.iter().map(|function| {
        format!(
            "{}:{},{} at {}, {} bytes",
            function.object, function.name, function.sympos, function.address, function.size
        )
    });
    output.lines(Tone::Plain, functions, verbose)?;
    if verbose {
        for symbol in &report.symbols {
            let line = format!("uses {} at {}", symbol.name, symbol.address);
            output.line(Tone::Plain, &line)?;
        }
    }
    output.line(Tone::Plain, &memory("code", &report.code))?;
    output.line(Tone::Plain, &memory("constants", &report.rodata))?;
    output.line(Tone::Plain, &memory("data", &report.data))?;
    task_lines(&report.tasks, verbose, output)?;
    Ok(output.line(Tone::Good, &summary(&report))?)
}

fn memory(what: &str, piece: &AllocationReport) -> String {
    let (bytes, address) = (piece.bytes, &piece.address);
    format!("{what}: {bytes} bytes at {address}, in hidden memory")
}

/// `fix: would apply; 40 tasks would switch now (by stack); 1 task would block the
/// transition; guest paused …`.
fn summary(report: &CheckReport) -> String {
    let mut parts = vec![format!("{}: would apply", report.name)];
    parts.extend(switched(&report.tasks, "would switch now"));
    parts.push(match (pending(&report.tasks).count(), report.at_once) {
        (0, true) => "no task would block the transition".to_owned(),
        (0, false) => "a vCPU is in the middle of a context switch".to_owned(),
        (count, _) => format!("{} would block the transition", count_of(count, "task")),
    });
    parts.push(pauses(&report.pauses));
    parts.join("; ")
}
