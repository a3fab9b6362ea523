//! `outpatch apply`, `status` and `revert`.

use std::path::Path;

use patcher::{Mode, PatchPhase, PatchStatus};
use serde::Serialize;
use vmm::api::types::{PatchChange, Vm};

use crate::cli::commands::{Following, VerbError, Waiting};
use crate::cli::module::read_module;
use crate::cli::output::{Output, Tone};
use crate::cli::progress::{Outcome, Watch, pauses, task_head, task_line, ways, word};
use vmm::client::Client;

/// Applies the module in `file`.
pub fn apply(
    connection: &Client,
    file: &Path,
    waiting: &Waiting,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let module = read_module(file)?;
    let begun: PatchStatus = connection
        .post(&patches(waiting.mode), module)
        .map_err(|source| VerbError::Module {
            path: file.to_owned(),
            source,
        })?;
    let begun = signal_after(connection, begun, waiting)?;
    follow(
        connection,
        begun,
        PatchPhase::Applied,
        &waiting.following,
        json,
        screen,
    )
}

/// Reverts the patch `name`, or the only one.
pub fn revert(
    connection: &Client,
    name: Option<&str>,
    waiting: &Waiting,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let name = match name {
        Some(name) => name.to_owned(),
        None => the_only_one(&connection.get::<Vec<PatchStatus>>("/patches")?)?,
    };
    let change = PatchChange {
        enabled: Some(false),
        mode: Some(waiting.mode),
        ..PatchChange::default()
    };
    let begun: PatchStatus = connection.patch(&resource(&name), &change)?;
    let begun = signal_after(connection, begun, waiting)?;
    follow(
        connection,
        begun,
        PatchPhase::Reverted,
        &waiting.following,
        json,
        screen,
    )
}

/// Turns the running transition of the patch `name`, or of the only one that has one, round.
pub fn cancel(
    connection: &Client,
    name: Option<&str>,
    following: &Following,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let change = PatchChange {
        cancel: Some(true),
        ..PatchChange::default()
    };
    let begun = change_moving(connection, name, &change)?;
    follow_on(connection, begun, following, json, screen)
}

/// Moves every task in the running transition of the patch `name`, or of the only one that has one, and waits for its end.
pub fn force(
    connection: &Client,
    name: Option<&str>,
    following: &Following,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let change = PatchChange {
        force: Some(true),
        ..PatchChange::default()
    };
    let begun = change_moving(connection, name, &change)?;
    follow_on(connection, begun, following, json, screen)
}

/// Makes a change to the patch `name`, or to the one that is in transition.
fn change_moving(
    connection: &Client,
    name: Option<&str>,
    change: &PatchChange,
) -> Result<PatchStatus, VerbError> {
    let name = match name {
        Some(name) => name.to_owned(),
        None => {
            let patches = connection.get::<Vec<PatchStatus>>("/patches")?;
            let moving = patches.into_iter().find(|patch| patch.transition);
            let none = || VerbError::InvalidState("no patch is in transition".to_owned());
            moving.ok_or_else(none)?.name
        }
    };
    Ok(connection.patch(&resource(&name), change)?)
}

/// Shows a transition that goes on, whichever way it goes now.
fn follow_on(
    connection: &Client,
    begun: PatchStatus,
    following: &Following,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let want = match begun.enabled {
        true => PatchPhase::Applied,
        false => PatchPhase::Reverted,
    };
    follow(connection, begun, want, following, json, screen)
}

/// Where a module is posted to.
fn patches(mode: Mode) -> String {
    format!("/patches?mode={}", word(&mode))
}

/// Sends the fake signal in the running transition of the patch `name`, or of the only one that has one.
pub fn signal(
    connection: &Client,
    name: Option<&str>,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let change = PatchChange {
        signal: Some(true),
        ..PatchChange::default()
    };
    let status = change_moving(connection, name, &change)?;
    if json {
        return Ok(screen.json(&status)?);
    }
    Ok(screen.line(Tone::Busy, &summary(&status))?)
}

/// Asks for the fake signal after the delay that was given, if the transition has not ended at once.
fn signal_after(
    connection: &Client,
    begun: PatchStatus,
    waiting: &Waiting,
) -> Result<PatchStatus, VerbError> {
    let (Some(after), true) = (waiting.signal_after, begun.transition) else {
        return Ok(begun);
    };
    let change = PatchChange {
        signal: Some(true),
        signal_after_ms: Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
        ..PatchChange::default()
    };
    match connection.patch(&resource(&begun.name), &change) {
        Ok(status) => Ok(status),
        // It may have ended meanwhile; then there is nobody left to signal.
        Err(error) => {
            let now: PatchStatus = connection.get(&resource(&begun.name))?;
            if now.transition {
                return Err(error.into());
            }
            Ok(now)
        }
    }
}

fn the_only_one(patches: &[PatchStatus]) -> Result<String, VerbError> {
    let enabled: Vec<&PatchStatus> = patches.iter().filter(|patch| patch.enabled).collect();
    match enabled.as_slice() {
        [] => Err(VerbError::InvalidState("no patch is applied".to_owned())),
        [one] => Ok(one.name.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|patch| patch.name.as_str()).collect();
            let names = names.join(", ");
            Err(VerbError::InvalidState(format!(
                "several patches are applied: say which of {names}"
            )))
        }
    }
}

/// The path of a patch. What is no module's name cannot be in it, and is then not found.
fn resource(name: &str) -> String {
    let name: String = name
        .bytes()
        .map(|byte| match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'_' | b'-' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("/patches/{name}")
}

/// Shows a transition to its end, or as far as one wants to wait.
fn follow(
    connection: &Client,
    begun: PatchStatus,
    want: PatchPhase,
    waiting: &Following,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    if waiting.no_wait {
        return if json {
            Ok(screen.json(&begun)?)
        } else {
            Ok(screen.line(Tone::Busy, &summary(&begun))?)
        };
    }
    if !json {
        screen.line(Tone::Strong, &heading(&begun))?;
    }
    let watch = Watch {
        connection,
        want,
        timeout: waiting.timeout,
    };
    let outcome = watch.run(begun, if json { None } else { Some(&mut *screen) })?;
    let (Outcome::Done(status) | Outcome::Turned(status) | Outcome::TimedOut(status)) = &outcome;
    if json {
        screen.json(status)?;
    }
    match &outcome {
        Outcome::Done(_) if json => Ok(()),
        Outcome::Done(status) => Ok(screen.line(Tone::Good, &summary(status))?),
        Outcome::Turned(status) => Err(VerbError::InvalidState(format!(
            "somebody else turned the transition round: {}",
            summary(status)
        ))),
        Outcome::TimedOut(status) => Err(VerbError::TimedOut(unfinished(status))),
    }
}

/// `fix: applying vmlinux:cmdline_proc_show`.
fn heading(status: &PatchStatus) -> String {
    let functions: Vec<_> = status
        .functions
        .iter()
        .map(|f| format!("{}:{}", f.object, f.name))
        .collect();
    let verb = match status.phase {
        PatchPhase::Applying | PatchPhase::Applied => "applying",
        PatchPhase::Reverting | PatchPhase::Reverted => "reverting",
    };
    format!("{}: {verb} {}", status.name, functions.join(", "))
}

/// `fix: applied in 34 ms; tasks: 40 by their stack; guest stopped 3 times, …`.
fn summary(status: &PatchStatus) -> String {
    let name = &status.name;
    let phase = word(&status.phase);
    if status.transition {
        return format!("{name}: {phase}; {}", waiting_words(status));
    }
    let mut parts = vec![format!("{name}: {phase} in {} ms", status.transition_ms)];
    let ways = ways(&status.tasks);
    if !ways.is_empty() {
        parts.push(format!("tasks: {ways}"));
    }
    parts.push(format!("guest stopped {}", pauses(&status.pauses)));
    parts.join("; ")
}

/// Who is in the way of a transition that goes on, in one line.
fn unfinished(status: &PatchStatus) -> String {
    /// More would not help a reader; `outpatch status NAME` has them all.
    const NAMED: usize = 5;
    let waiting = status.tasks.iter().filter(|t| t.switched_by.is_none());
    let mut names: Vec<_> = waiting
        .take(NAMED)
        .map(|t| match &t.blocker {
            Some(blocker) => format!("{} {} ({blocker})", t.pid, t.comm),
            None => format!("{} {}", t.pid, t.comm),
        })
        .collect();
    if waiting_tasks(status) > names.len() {
        names.push("…".to_owned());
    }
    format!(
        "{} is still {}, and the transition goes on; {}: {}",
        status.name,
        word(&status.phase),
        waiting_words(status),
        names.join(", ")
    )
}

fn waiting_tasks(status: &PatchStatus) -> usize {
    status
        .tasks
        .iter()
        .filter(|t| t.switched_by.is_none())
        .count()
}

fn waiting_words(status: &PatchStatus) -> String {
    match waiting_tasks(status) {
        1 => "1 task waits".to_owned(),
        count => format!("{count} tasks wait"),
    }
}

/// What `outpatch status --json` prints: both resources.
#[derive(Serialize)]
struct Status {
    vm: Vm,
    patches: Vec<PatchStatus>,
}

/// The VM and its patches, or one patch in full.
pub fn status(
    connection: &Client,
    name: Option<&str>,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    if let Some(name) = name {
        let patch: PatchStatus = connection.get(&resource(name))?;
        return if json {
            Ok(screen.json(&patch)?)
        } else {
            one(&patch, screen)
        };
    }
    let vm: Vm = connection.get("/vm")?;
    let patches: Vec<PatchStatus> = connection.get("/patches")?;
    if json {
        return Ok(screen.json(&Status { vm, patches })?);
    }
    overview(&vm, &patches, screen)
}

fn overview(vm: &Vm, patches: &[PatchStatus], screen: &mut Output<'_>) -> Result<(), VerbError> {
    let cpus = if vm.cpus == 1 { "vCPU" } else { "vCPUs" };
    let kernel = vm.kernel.as_deref().unwrap_or("not found yet");
    let state = format!(
        "{}, {} {cpus}, {} MiB, process {}",
        word(&vm.state),
        vm.cpus,
        vm.memory >> 20,
        vm.pid
    );
    screen.line(Tone::Plain, &format!("VM      {state}"))?;
    screen.line(Tone::Plain, &format!("kernel  {kernel}"))?;
    screen.line(Tone::Plain, &format!("stopped {}", pauses(&vm.pauses)))?;
    if patches.is_empty() {
        return Ok(screen.line(Tone::Plain, "no patches")?);
    }
    let head = ["PATCH", "PHASE", "FUNCTIONS", "TASKS", "WAIT", "MS"];
    let rows: Vec<_> = patches
        .iter()
        .map(|patch| {
            vec![
                patch.name.clone(),
                word(&patch.phase),
                patch.functions.len().to_string(),
                patch.tasks.len().to_string(),
                waiting_tasks(patch).to_string(),
                patch.transition_ms.to_string(),
            ]
        })
        .collect();
    Ok(screen.table(&head, &rows)?)
}

fn one(patch: &PatchStatus, screen: &mut Output<'_>) -> Result<(), VerbError> {
    let tone = if patch.transition {
        Tone::Busy
    } else {
        Tone::Good
    };
    screen.line(tone, &summary(patch))?;
    for function in &patch.functions {
        let state = if function.patched { "new" } else { "old" };
        let line = format!(
            "{}:{},{} {state}",
            function.object, function.name, function.sympos
        );
        screen.line(Tone::Plain, &line)?;
    }
    if !patch.tasks.is_empty() {
        screen.line(Tone::Strong, &task_head())?;
    }
    for task in &patch.tasks {
        let tone = if task.switched_by.is_none() {
            Tone::Busy
        } else {
            Tone::Plain
        };
        screen.line(tone, &task_line(task))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use introspect::TaskKind;
    use patcher::{FunctionReport, PauseReport, SwitchedBy, TaskReport};

    use super::*;

    fn patch(name: &str, phase: PatchPhase, waiting: i32) -> PatchStatus {
        let transition = matches!(phase, PatchPhase::Applying | PatchPhase::Reverting);
        PatchStatus {
            name: name.into(),
            phase,
            enabled: matches!(phase, PatchPhase::Applying | PatchPhase::Applied),
            transition,
            force: false,
            replace: false,
            signal: false,
            functions: vec![FunctionReport {
                object: "vmlinux".into(),
                name: "cmdline_proc_show".into(),
                sympos: 0,
                patched: true,
            }],
            tasks: (0..waiting)
                .map(|pid| TaskReport {
                    pid,
                    comm: "sleeper".into(),
                    kind: TaskKind::User,
                    state: 'S',
                    switched_by: None,
                    blocker: Some("in cmdline_proc_show".into()),
                    since_ms: Some(1),
                    signals: 0,
                    after_ms: None,
                })
                .chain([TaskReport {
                    pid: 99,
                    comm: "sh".into(),
                    kind: TaskKind::User,
                    state: 'R',
                    switched_by: Some(SwitchedBy::Stack),
                    blocker: None,
                    since_ms: None,
                    signals: 0,
                    after_ms: Some(3),
                }])
                .collect(),
            transition_ms: 34,
            pauses: PauseReport::default(),
        }
    }

    #[test]
    fn without_a_name_the_only_patch_is_meant() {
        let one = patch("fix", PatchPhase::Applied, 0);
        let gone = patch("old", PatchPhase::Reverted, 0);
        let another = patch("other", PatchPhase::Applying, 1);
        assert_eq!(the_only_one(&[gone.clone(), one.clone()]).unwrap(), "fix");
        let none = the_only_one(&[gone]).unwrap_err().to_string();
        assert_eq!(none, "no patch is applied");
        let several = the_only_one(&[one, another]).unwrap_err().to_string();
        assert!(several.contains("fix, other"), "{several}");
    }

    #[test]
    fn a_timeout_names_who_is_in_the_way() {
        let text = unfinished(&patch("fix", PatchPhase::Applying, 7));
        assert!(text.contains("still applying"), "{text}");
        assert!(text.contains("7 tasks wait"), "{text}");
        assert!(
            text.contains("4 sleeper (in cmdline_proc_show), …"),
            "{text}"
        );
    }

    #[test]
    fn a_name_cannot_leave_its_place_in_the_path() {
        assert_eq!(resource("live-patch_1.2"), "/patches/live-patch_1.2");
        assert_eq!(resource("../vm?x#y"), "/patches/..%2Fvm%3Fx%23y");
    }

    #[test]
    fn the_summary_says_what_it_took() {
        let text = summary(&patch("fix", PatchPhase::Applied, 0));
        assert!(
            text.starts_with("fix: applied in 34 ms; tasks: 1 by their stack; "),
            "{text}"
        );
        assert_eq!(
            summary(&patch("fix", PatchPhase::Applying, 2)),
            "fix: applying; 2 tasks wait"
        );
    }
}
