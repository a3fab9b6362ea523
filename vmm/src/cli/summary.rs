//! Lines of text on tasks, pauses and patches, for all commands that show them.

use std::io;

use patcher::{PatchStatus, PauseReport, SwitchedBy, TaskReport};

use crate::cli::output::{Output, Tone};

/// A task's part in a transition, in fixed columns, as lines are printed one by one.
pub fn task_line(task: &TaskReport) -> String {
    let after = match (task.switched_by, task.after_ms, &task.blocker) {
        (Some(_), Some(ms), _) => format!("{ms} ms"),
        (Some(_), None, _) => String::new(),
        (None, _, Some(blocker)) => format!("blocked: {blocker}"),
        (None, _, None) => "not checked yet".to_owned(),
    };
    let switched_by = task.switched_by.map(|by| word(&by));
    columns(
        &task.pid.to_string(),
        &task.comm,
        &word(&task.kind),
        switched_by.as_deref().unwrap_or("pending"),
        &after,
    )
}

/// The heading above [`task_line`]s.
pub fn task_heading() -> String {
    columns("PID", "COMM", "KIND", "SWITCHED-BY", "AFTER")
}

/// Prints the tasks that have not switched, not all of them when they are many; when `verbose`
/// every task, under a heading.
pub fn task_lines(tasks: &[TaskReport], verbose: bool, output: &mut Output<'_>) -> io::Result<()> {
    if verbose && !tasks.is_empty() {
        output.line(Tone::Strong, &task_heading())?;
    }
    output.lines(Tone::Busy, pending(tasks).map(task_line), verbose)?;
    if verbose {
        let switched = tasks.iter().filter(|task| task.switched_by.is_some());
        output.lines(Tone::Plain, switched.map(task_line), true)?;
    }
    Ok(())
}

fn columns(pid: &str, comm: &str, kind: &str, switched_by: &str, after: &str) -> String {
    format!("{pid:>7} {comm:<15} {kind:<7} {switched_by:<12} {after}")
        .trim_end()
        .to_owned()
}

/// The word that the API has for a value.
pub fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "?".to_owned(),
    }
}

/// `3 tasks switched (2 by stack, 1 forked); 1 exited`, with `verb` for `switched`: tasks that
/// ended a transition without switching are counted apart. `None` when there are neither.
pub fn switched(tasks: &[TaskReport], verb: &str) -> Option<String> {
    const SWITCHED: [(SwitchedBy, &str); 6] = [
        (SwitchedBy::KernelExit, "on kernel exit"),
        (SwitchedBy::Stack, "by stack"),
        (SwitchedBy::UserMode, "in user mode"),
        (SwitchedBy::Idle, "in the idle loop"),
        (SwitchedBy::Forked, "forked"),
        (SwitchedBy::Forced, "forced"),
    ];
    const OTHERS: [(SwitchedBy, &str); 2] = [
        (
            SwitchedBy::NotSwitched,
            "had not switched before the reversal",
        ),
        (SwitchedBy::Exited, "exited"),
    ];
    let count = |by| tasks.iter().filter(|t| t.switched_by == Some(by)).count();
    let ways: Vec<_> = SWITCHED
        .iter()
        .map(|(by, text)| (count(*by), *text))
        .filter(|(count, _)| *count > 0)
        .collect();
    let total = ways.iter().map(|(count, _)| count).sum();
    let ways = match ways.as_slice() {
        [(_, text)] => (*text).to_owned(),
        ways => ways
            .iter()
            .map(|(count, text)| format!("{count} {text}"))
            .collect::<Vec<_>>()
            .join(", "),
    };
    let mut parts = Vec::new();
    if total > 0 {
        parts.push(format!("{} {verb} ({ways})", count_of(total, "task")));
    }
    for (by, text) in OTHERS {
        match count(by) {
            0 => {}
            others if parts.is_empty() => {
                parts.push(format!("{} {text}", count_of(others, "task")));
            }
            others => parts.push(format!("{others} {text}")),
        }
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// `1 task`, `2 tasks`.
pub fn count_of(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}

/// `guest paused 3 times, 1.204 ms in all, 0.512 ms at most`.
pub fn pauses(pauses: &PauseReport) -> String {
    let times = if pauses.count == 1 { "time" } else { "times" };
    format!(
        "guest paused {} {times}, {} ms in all, {} ms at most",
        pauses.count,
        milliseconds(pauses.total_us),
        milliseconds(pauses.longest_us)
    )
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

/// The tasks that have not switched.
pub fn pending(tasks: &[TaskReport]) -> impl Iterator<Item = &TaskReport> {
    tasks.iter().filter(|task| task.switched_by.is_none())
}

/// `2 tasks pending`.
pub fn pending_count(patch: &PatchStatus) -> String {
    let count = pending(&patch.tasks).count();
    format!("{} pending", count_of(count, "task"))
}

/// `fix: applied in 34 ms; 40 tasks switched (by stack); guest paused 3 times, …`, or, while a
/// transition runs, `fix: applying; 2 tasks pending`.
pub fn patch_line(patch: &PatchStatus) -> String {
    let (name, phase) = (&patch.name, word(&patch.phase));
    if patch.transition {
        return format!("{name}: {phase}; {}", pending_count(patch));
    }
    let mut parts = vec![format!("{name}: {phase} in {} ms", patch.transition_ms)];
    parts.extend(switched(&patch.tasks, "switched"));
    parts.push(pauses(&patch.pauses));
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use introspect::TaskKind;
    use patcher::{FunctionReport, PatchPhase};

    use super::*;

    fn task(pid: i32, switched_by: Option<SwitchedBy>) -> TaskReport {
        let pending = switched_by.is_none();
        TaskReport {
            pid,
            comm: format!("task-{pid}"),
            kind: TaskKind::User,
            state: 'S',
            switched_by,
            blocker: pending.then(|| "in do_read+0x10/0x40".to_owned()),
            since_ms: pending.then_some(0),
            signals: 0,
            after_ms: switched_by.map(|_| 12),
        }
    }

    fn patch(phase: PatchPhase, tasks: Vec<TaskReport>) -> PatchStatus {
        PatchStatus {
            name: "fix".into(),
            phase,
            enabled: matches!(phase, PatchPhase::Applying | PatchPhase::Applied),
            transition: matches!(phase, PatchPhase::Applying | PatchPhase::Reverting),
            force: false,
            replace: false,
            signal: false,
            kept_bytes: 0,
            functions: vec![FunctionReport {
                object: "vmlinux".into(),
                name: "cmdline_proc_show".into(),
                sympos: 0,
                patched: true,
            }],
            tasks,
            transition_ms: 34,
            pauses: PauseReport::default(),
        }
    }

    #[test]
    fn a_line_says_how_a_task_switched_or_which_frame_blocks_it() {
        assert_eq!(
            task_line(&task(7, Some(SwitchedBy::Stack))),
            "      7 task-7          user    stack        12 ms"
        );
        assert_eq!(
            task_line(&task(8, None)),
            "      8 task-8          user    pending      blocked: in do_read+0x10/0x40"
        );
    }

    #[test]
    fn switched_tasks_are_counted_by_how_they_switched() {
        let tasks = [
            task(1, Some(SwitchedBy::Stack)),
            task(2, Some(SwitchedBy::KernelExit)),
            task(3, Some(SwitchedBy::Stack)),
            task(4, None),
        ];
        assert_eq!(
            switched(&tasks, "switched").as_deref(),
            Some("3 tasks switched (1 on kernel exit, 2 by stack)")
        );
        assert_eq!(switched(&tasks[3..], "switched"), None);
        let one_way = [
            task(1, Some(SwitchedBy::Stack)),
            task(2, Some(SwitchedBy::Stack)),
        ];
        assert_eq!(
            switched(&one_way, "switched").as_deref(),
            Some("2 tasks switched (by stack)")
        );
    }

    #[test]
    fn tasks_that_did_not_switch_are_counted_apart() {
        let tasks = [
            task(1, Some(SwitchedBy::Stack)),
            task(2, Some(SwitchedBy::Exited)),
            task(3, Some(SwitchedBy::NotSwitched)),
        ];
        assert_eq!(
            switched(&tasks, "switched").as_deref(),
            Some("1 task switched (by stack); 1 had not switched before the reversal; 1 exited")
        );
        assert_eq!(
            switched(&tasks[1..], "switched").as_deref(),
            Some("1 task had not switched before the reversal; 1 exited")
        );
    }

    #[test]
    fn pauses_are_shown_to_the_microsecond() {
        let report = PauseReport {
            count: 3,
            total_us: 1204,
            longest_us: 52,
            ..PauseReport::default()
        };
        assert_eq!(
            pauses(&report),
            "guest paused 3 times, 1.204 ms in all, 0.052 ms at most"
        );
    }

    #[test]
    fn the_line_on_a_patch_says_what_its_transition_took() {
        let done = patch(PatchPhase::Applied, vec![task(99, Some(SwitchedBy::Stack))]);
        let text = patch_line(&done);
        let start = "fix: applied in 34 ms; 1 task switched (by stack); guest paused 0 times, ";
        assert!(text.starts_with(start), "{text}");
        let running = patch(PatchPhase::Applying, vec![task(1, None), task(2, None)]);
        assert_eq!(patch_line(&running), "fix: applying; 2 tasks pending");
    }
}
