//! `outpatch status`: the VM and all patches, or one patch in full.

use patcher::PatchStatus;
use serde::Serialize;
use vmm::api::types::Vm;
use vmm::client::{Client, patch_resource};

use crate::cli::args::PatchName;
use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};
use crate::cli::summary::{patch_line, pauses, pending, task_lines, word};

/// What `outpatch status --json` prints: two resources in one object.
#[derive(Serialize)]
struct Status {
    vm: Vm,
    patches: Vec<PatchStatus>,
}

/// Shows the patch `name`, with the tasks that have not switched or, when `verbose`, all tasks;
/// without a name the VM and all patches.
pub fn status(
    client: &Client,
    name: Option<&PatchName>,
    verbose: bool,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    if let Some(name) = name {
        let patch: PatchStatus = client.get(&patch_resource(name.as_str()))?;
        return if json {
            Ok(output.json(&patch)?)
        } else {
            one_patch(&patch, verbose, output)
        };
    }
    let vm: Vm = client.get("/vm")?;
    let patches: Vec<PatchStatus> = client.get("/patches")?;
    if json {
        return Ok(output.json(&Status { vm, patches })?);
    }
    overview(&vm, &patches, output)
}

fn overview(vm: &Vm, patches: &[PatchStatus], output: &mut Output<'_>) -> Result<(), CommandError> {
    let cpus = if vm.cpus == 1 { "vCPU" } else { "vCPUs" };
    let kernel = vm.kernel.as_deref().unwrap_or("not found yet");
    let state = format!(
        "{}, {} {cpus}, {} MiB, process {}",
        word(&vm.state),
        vm.cpus,
        vm.memory >> 20,
        vm.pid
    );
    output.line(Tone::Plain, &format!("VM      {state}"))?;
    output.line(Tone::Plain, &format!("kernel  {kernel}"))?;
    output.line(Tone::Plain, &pauses(&vm.pauses))?;
    if patches.is_empty() {
        return Ok(output.line(Tone::Plain, "no patches")?);
    }
    let heading = ["PATCH", "PHASE", "FUNCTIONS", "TASKS", "PENDING", "MS"];
    let rows: Vec<_> = patches
        .iter()
        .map(|patch| {
            vec![
                patch.name.clone(),
                word(&patch.phase),
                patch.functions.len().to_string(),
                patch.tasks.len().to_string(),
                pending(&patch.tasks).count().to_string(),
                patch.transition_ms.to_string(),
            ]
        })
        .collect();
    Ok(output.table(&heading, &rows)?)
}

fn one_patch(
    patch: &PatchStatus,
    verbose: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let tone = if patch.transition {
        Tone::Busy
    } else {
        Tone::Good
    };
    output.line(tone, &patch_line(patch))?;
    if patch.kept_bytes > 0 {
        let kept = format!(
            "keeps {} bytes in the guest when it is reverted: the guest may hold addresses in them",
            patch.kept_bytes
        );
        output.line(Tone::Plain, &kept)?;
    }
    let functions = patch.functions.iter().map(|function| {
        let state = if function.patched { "new" } else { "previous" };
        let (object, name, sympos) = (&function.object, &function.name, function.sympos);
        format!("{object}:{name},{sympos} {state}")
    });
    output.lines(Tone::Plain, functions, verbose)?;
    Ok(task_lines(&patch.tasks, verbose, output)?)
}
