//! `outpatch apply` and `revert`, and the commands that change a running transition: `cancel`,
//! `force` and `signal`.

use std::path::Path;

use patcher::{PatchPhase, PatchStatus};
use vmm::api::types::PatchChange;
use vmm::client::{Client, patch_resource};

use crate::cli::args::{Following, PatchName, Waiting};
use crate::cli::error::CommandError;
use crate::cli::module::read_module;
use crate::cli::output::{Output, Tone};
use crate::cli::progress::{Outcome, Watch};
use crate::cli::summary::{patch_line, pending, pending_count, word};

/// Applies the module in `file`.
pub fn apply(
    client: &Client,
    file: &Path,
    waiting: &Waiting,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let module = read_module(file)?;
    let resource = format!("/patches?mode={}", word(&waiting.mode));
    let started: PatchStatus =
        client
            .post_module(&resource, module)
            .map_err(|source| CommandError::Module {
                path: file.to_owned(),
                source,
            })?;
    let started = signal_after(client, started, waiting)?;
    let target = PatchPhase::Applied;
    follow(client, started, target, &waiting.following, json, output)
}

/// Reverts the patch `name`, or the single one that is applied.
pub fn revert(
    client: &Client,
    name: Option<&PatchName>,
    waiting: &Waiting,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let name = match name {
        Some(name) => name.as_str().to_owned(),
        None => single_patch(&client.get::<Vec<PatchStatus>>("/patches")?)?,
    };
    let change = PatchChange::revert(waiting.mode);
    let started: PatchStatus = client.patch(&patch_resource(&name), &change)?;
    let started = signal_after(client, started, waiting)?;
    let target = PatchPhase::Reverted;
    follow(client, started, target, &waiting.following, json, output)
}

/// Makes a change to the running transition of the patch `name`, or of the patch that has one, and
/// follows the transition in the direction that it then has.
pub fn change_transition(
    client: &Client,
    name: Option<&PatchName>,
    change: &PatchChange,
    following: &Following,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let name = match name {
        Some(name) => name.as_str().to_owned(),
        None => {
            let patches = client.get::<Vec<PatchStatus>>("/patches")?;
            let running = patches.into_iter().find(|patch| patch.transition);
            let none = || CommandError::InvalidState("no patch is in transition".to_owned());
            running.ok_or_else(none)?.name
        }
    };
    let changed: PatchStatus = client.patch(&patch_resource(&name), change)?;
    let target = match changed.enabled {
        true => PatchPhase::Applied,
        false => PatchPhase::Reverted,
    };
    follow(client, changed, target, following, json, output)
}

/// Requests the fake signal after the delay that was given, unless the transition has ended.
fn signal_after(
    client: &Client,
    started: PatchStatus,
    waiting: &Waiting,
) -> Result<PatchStatus, CommandError> {
    let (Some(after), true) = (waiting.signal_after, started.transition) else {
        return Ok(started);
    };
    let resource = patch_resource(&started.name);
    match client.patch(&resource, &PatchChange::signal(Some(after))) {
        Ok(status) => Ok(status),
        // The transition may have ended meanwhile; then there is no task to signal.
        Err(error) => {
            let now: PatchStatus = client.get(&resource)?;
            if now.transition {
                return Err(error.into());
            }
            Ok(now)
        }
    }
}

/// The name of the single patch that is applied or being applied.
fn single_patch(patches: &[PatchStatus]) -> Result<String, CommandError> {
    let enabled: Vec<&str> = patches
        .iter()
        .filter(|patch| patch.enabled)
        .map(|patch| patch.name.as_str())
        .collect();
    match enabled.as_slice() {
        [] => Err(CommandError::InvalidState("no patch is applied".to_owned())),
        [name] => Ok((*name).to_owned()),
        names => Err(CommandError::InvalidState(format!(
            "several patches are applied: name one of {}",
            names.join(", ")
        ))),
    }
}

/// Shows a transition to its end, or for as long as the caller wants to wait.
fn follow(
    client: &Client,
    started: PatchStatus,
    target: PatchPhase,
    following: &Following,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    if following.no_wait {
        return if json {
            Ok(output.json(&started)?)
        } else {
            Ok(output.line(Tone::Busy, &patch_line(&started))?)
        };
    }
    if following.verbose && !json {
        output.line(Tone::Strong, &heading(&started))?;
    }
    let watch = Watch {
        client,
        target,
        timeout: following.timeout,
        verbose: following.verbose,
    };
    let outcome = watch.run(started, if json { None } else { Some(&mut *output) })?;
    let (Outcome::Completed(patch) | Outcome::Reversed(patch) | Outcome::TimedOut(patch)) =
        &outcome;
    if json {
        output.json(patch)?;
    }
    match &outcome {
        Outcome::Completed(_) if json => Ok(()),
        Outcome::Completed(patch) => Ok(output.line(Tone::Good, &patch_line(patch))?),
        Outcome::Reversed(patch) => Err(CommandError::InvalidState(format!(
            "the transition was reversed by another client: {}",
            patch_line(patch)
        ))),
        Outcome::TimedOut(patch) => Err(CommandError::TimedOut(unfinished(patch))),
    }
}

/// `fix: applying vmlinux:cmdline_proc_show`.
fn heading(patch: &PatchStatus) -> String {
    let functions: Vec<_> = patch
        .functions
        .iter()
        .map(|f| format!("{}:{}", f.object, f.name))
        .collect();
    let phase = match patch.phase {
        PatchPhase::Applying | PatchPhase::Applied => "applying",
        PatchPhase::Reverting | PatchPhase::Reverted => "reverting",
    };
    format!("{}: {phase} {}", patch.name, functions.join(", "))
}

/// Which tasks block a transition that still runs, in one line.
fn unfinished(patch: &PatchStatus) -> String {
    /// Tasks that are named; `outpatch status NAME` lists more.
    const MAX_NAMED: usize = 5;
    let mut named: Vec<_> = pending(&patch.tasks)
        .take(MAX_NAMED)
        .map(|task| match &task.blocker {
            Some(blocker) => format!("{} {} ({blocker})", task.pid, task.comm),
            None => format!("{} {}", task.pid, task.comm),
        })
        .collect();
    if pending(&patch.tasks).count() > named.len() {
        named.push("…".to_owned());
    }
    format!(
        "{} is still {}, and the transition continues; {}: {}",
        patch.name,
        word(&patch.phase),
        pending_count(patch),
        named.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use introspect::TaskKind;
    use patcher::{PauseReport, TaskReport};

    use super::*;

    fn patch(name: &str, phase: PatchPhase, pending: i32) -> PatchStatus {
        PatchStatus {
            name: name.into(),
            phase,
            enabled: matches!(phase, PatchPhase::Applying | PatchPhase::Applied),
            transition: matches!(phase, PatchPhase::Applying | PatchPhase::Reverting),
            force: false,
            replace: false,
            signal: false,
            kept_bytes: 0,
            functions: vec![],
            tasks: (0..pending)
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
                .collect(),
            transition_ms: 34,
            pauses: PauseReport::default(),
        }
    }

    #[test]
    fn without_a_name_the_single_applied_patch_is_meant() {
        let one = patch("fix", PatchPhase::Applied, 0);
        let reverted = patch("old", PatchPhase::Reverted, 0);
        let another = patch("other", PatchPhase::Applying, 1);
        let found = single_patch(&[reverted.clone(), one.clone()]).unwrap();
        assert_eq!(found, "fix");
        let none = single_patch(&[reverted]).unwrap_err().to_string();
        assert_eq!(none, "no patch is applied");
        let several = single_patch(&[one, another]).unwrap_err().to_string();
        assert!(several.contains("fix, other"), "{several}");
    }

    #[test]
    fn a_timeout_names_tasks_that_block() {
        let text = unfinished(&patch("fix", PatchPhase::Applying, 7));
        assert!(text.contains("still applying"), "{text}");
        assert!(text.contains("7 tasks pending"), "{text}");
        assert!(
            text.contains("4 sleeper (in cmdline_proc_show), …"),
            "{text}"
        );
    }
}
