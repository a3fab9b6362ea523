//! `outpatch pause`, `resume` and `stop`.

use std::time::{Duration, Instant};

use vmm::api::types::{Vm, VmChange, VmState};

use crate::cli::commands::VerbError;
use crate::cli::output::{Output, Tone};
use crate::cli::progress::word;
use vmm::client::Client;

/// How long a VMM may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Stops all vCPUs.
pub fn pause(c: &Client, json: bool, screen: &mut Output<'_>) -> Result<(), VerbError> {
    change(c, VmState::Paused, json, screen)
}

/// Lets them run.
pub fn resume(c: &Client, json: bool, screen: &mut Output<'_>) -> Result<(), VerbError> {
    change(c, VmState::Running, json, screen)
}

fn change(
    connection: &Client,
    state: VmState,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    let vm: Vm = connection.patch("/vm", &VmChange { state })?;
    if json {
        return Ok(screen.json(&vm)?);
    }
    let tone = match vm.state {
        VmState::Running => Tone::Good,
        VmState::Paused => Tone::Busy,
    };
    Ok(screen.line(tone, &word(&vm.state))?)
}

/// Ends the VM and waits until nobody answers any more.
pub fn stop(connection: &Client, json: bool, screen: &mut Output<'_>) -> Result<(), VerbError> {
    let vm: Vm = connection.delete("/vm")?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while connection.is_there() {
        if Instant::now() >= deadline {
            return Err(VerbError::TimedOut(format!(
                "the VMM (process {}) was told to end and still answers after {} s",
                vm.pid,
                STOP_TIMEOUT.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if json {
        return Ok(screen.json(&vm)?);
    }
    Ok(screen.line(Tone::Plain, "stopped")?)
}
