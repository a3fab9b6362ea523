//! `outpatch ps`, `stack` and `symbols`: what a running guest, or one in a core file, has in
//! memory.

use std::collections::BTreeSet;

use vmm::api::types::{Task, TaskStack};

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone, printable};
use crate::cli::source::GuestSource;
use crate::cli::summary::word;

/// Prints on standard error what the answer warns of: each warning once.
fn warn<'t>(tasks: impl IntoIterator<Item = &'t Task>) {
    for warning in warnings(tasks) {
        eprintln!("outpatch: warning: {}", printable(warning));
    }
}

fn warnings<'t>(tasks: impl IntoIterator<Item = &'t Task>) -> BTreeSet<&'t str> {
    let warnings = tasks.into_iter().map(|task| task.warning.as_deref());
    warnings.flatten().collect()
}

/// Prints the tasks, one a line.
pub fn ps(
    guest: &mut GuestSource,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let tasks = guest.tasks()?;
    warn(&tasks);
    if json {
        return Ok(output.json(&tasks)?);
    }
    let head = ["PID", "TGID", "S", "KIND", "VCPU", "PATCH", "COMM"];
    let rows: Vec<_> = tasks.iter().map(row).collect();
    Ok(output.table(&head, &rows)?)
}

fn row(task: &Task) -> Vec<String> {
    vec![
        task.pid.to_string(),
        task.tgid.to_string(),
        task.state.to_string(),
        word(&task.kind),
        dash(task.vcpu),
        dash(task.patch_state),
        task.comm.clone(),
    ]
}

fn dash(number: Option<impl ToString>) -> String {
    number.map_or("-".to_owned(), |number| number.to_string())
}

/// Prints the stack of one task.
pub fn stack(
    guest: &mut GuestSource,
    pid: i32,
    all: bool,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let stack = guest.stack(pid)?;
    warn([&stack.task]);
    if json {
        return Ok(output.json(&stack)?);
    }
    show(&stack, all, output)
}

/// Prints the stacks of all tasks, each after a line with its task.
pub fn stacks(
    guest: &mut GuestSource,
    all: bool,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let stacks = guest.stacks()?;
    warn(stacks.iter().map(|stack| &stack.task));
    if json {
        return Ok(output.json(&stacks)?);
    }
    for stack in &stacks {
        let Task {
            pid, state, comm, ..
        } = &stack.task;
        output.line(Tone::Plain, &format!("{pid} {comm} ({state})"))?;
        show(stack, all, output)?;
        output.line(Tone::Plain, "")?;
    }
    Ok(())
}

fn show(stack: &TaskStack, all: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    for line in frames(stack, all) {
        output.line(Tone::Plain, &line)?;
    }
    let (tone, verdict) = verdict(stack);
    Ok(output.line(tone, &verdict)?)
}

/// Prints the symbols of the kernel and its modules, one a line.
pub fn symbols(
    guest: &mut GuestSource,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let symbols = guest.symbols()?;
    if json {
        return Ok(output.json(&symbols)?);
    }
    for symbol in symbols {
        let (letter, name) = (symbol.letter, symbol.name);
        let address = symbol.address.trim_start_matches("0x");
        let line = format!("{address} {letter} {name}");
        match symbol.module {
            Some(module) => output.fields(&[&line, &format!("[{module}]")])?,
            None => output.fields(&[&line])?,
        }
    }
    Ok(output.flush()?)
}

/// The lines of `/proc/PID/stack` (`fs/proc/base.c: proc_pid_stack`).
fn frames(stack: &TaskStack, all: bool) -> Vec<String> {
    stack
        .frames
        .iter()
        .skip_while(|frame| frame.scheduler && !all)
        .map(|frame| format!("[<0>] {}", frame.symbol))
        .collect()
}

fn verdict(stack: &TaskStack) -> (Tone, String) {
    match &stack.reason {
        Some(reason) => (Tone::Bad, format!("unreliable: {reason}")),
        None if !stack.reliable => (Tone::Bad, "unreliable".to_owned()),
        None if stack.frames.is_empty() => (Tone::Good, "reliable: not in the kernel".to_owned()),
        None => (Tone::Good, "reliable".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use introspect::TaskKind;
    use vmm::api::types::StackFrame;

    use super::*;

    fn frame(symbol: &str, scheduler: bool) -> StackFrame {
        StackFrame {
            ip: "0xffffffff81000000".into(),
            symbol: symbol.into(),
            scheduler,
        }
    }

    fn sleeping() -> TaskStack {
        TaskStack {
            task: Task {
                pid: 1,
                tgid: 1,
                state: 'S',
                kind: TaskKind::User,
                vcpu: None,
                cpu: Some(0),
                patch_state: Some(-1),
                comm: "init".into(),
                warning: None,
            },
            reliable: true,
            reason: None,
            frames: vec![
                frame("__schedule+0x1/0x2", true),
                frame("schedule+0x1/0x2", true),
                frame("do_wait+0x1/0x2", false),
                frame("io_schedule+0x1/0x2", true),
            ],
        }
    }

    #[test]
    fn only_frames_of_the_scheduler_at_the_top_are_left_out() {
        assert_eq!(
            frames(&sleeping(), false),
            ["[<0>] do_wait+0x1/0x2", "[<0>] io_schedule+0x1/0x2"]
        );
        assert_eq!(frames(&sleeping(), true).len(), 4);
    }

    #[test]
    fn the_verdict_has_its_reason() {
        let mut stack = sleeping();
        assert_eq!(verdict(&stack).1, "reliable");
        stack.frames.clear();
        assert_eq!(verdict(&stack).1, "reliable: not in the kernel");
        stack.reliable = false;
        stack.reason = Some("more than 100 frames".into());
        assert_eq!(verdict(&stack).1, "unreliable: more than 100 frames");
    }

    #[test]
    fn a_warning_is_given_once() {
        let mut tasks = vec![sleeping().task; 3];
        assert!(warnings(&tasks).is_empty());
        for task in &mut tasks {
            task.warning = Some("tasklist_lock is held for writing".into());
        }
        let once: Vec<_> = warnings(&tasks).into_iter().collect();
        assert_eq!(once, ["tasklist_lock is held for writing"]);
    }

    #[test]
    fn an_unknown_number_is_a_dash() {
        let cells = row(&sleeping().task);
        assert_eq!(cells, ["1", "1", "S", "user", "-", "-1", "init"]);
    }
}
