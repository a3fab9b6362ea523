//! `outpatch pause`, `resume` and `stop`: the state of the VM.

use std::time::{Duration, Instant};

use vmm::api::types::{RequestedState, Vm, VmChange, VmState};
use vmm::client::Client;

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};
use crate::cli::summary::word;

/// How long a VMM may take to end after it was told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Pauses the vCPUs.
pub fn pause(c: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    change(c, RequestedState::Paused, json, output)
}

/// Resumes the vCPUs.
pub fn resume(c: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    change(c, RequestedState::Running, json, output)
}

fn change(
    client: &Client,
    state: RequestedState,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let vm: Vm = client.patch("/vm", &VmChange { state })?;
    if json {
        return Ok(output.json(&vm)?);
    }
    let tone = match vm.state {
        VmState::Running => Tone::Good,
        VmState::Paused => Tone::Busy,
        VmState::Panicked => Tone::Bad,
    };
    Ok(output.line(tone, &word(&vm.state))?)
}

/// Stops the VM and waits until its VMM has ended.
pub fn stop(client: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    let vm: Vm = client.delete("/vm")?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while !client.has_ended() {
        if Instant::now() >= deadline {
            return Err(CommandError::TimedOut(format!(
                "the VMM (process {}) was requested to stop and has not ended after {} s",
                vm.pid,
                STOP_TIMEOUT.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if json {
        return Ok(output.json(&vm)?);
    }
    Ok(output.line(Tone::Plain, "stopped")?)
}
