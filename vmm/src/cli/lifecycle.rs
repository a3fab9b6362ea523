//! `outpatch pause`, `resume` and `stop`.

use std::time::{Duration, Instant};

use vmm::api::types::{Vm, VmChange, VmState};

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};
use crate::cli::summary::word;
use vmm::client::Client;

/// How long a VMM may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Stops all vCPUs.
pub fn pause(c: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    change(c, VmState::Paused, json, output)
}

/// Lets them run.
pub fn resume(c: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    change(c, VmState::Running, json, output)
}

fn change(
    client: &Client,
    state: VmState,
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
    };
    Ok(output.line(tone, &word(&vm.state))?)
}

/// Ends the VM and waits until nobody answers any more.
pub fn stop(client: &Client, json: bool, output: &mut Output<'_>) -> Result<(), CommandError> {
    let vm: Vm = client.delete("/vm")?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while client.is_there() {
        if Instant::now() >= deadline {
            return Err(CommandError::TimedOut(format!(
                "the VMM (process {}) was told to end and still answers after {} s",
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
