//! Pauses the machine while the console's output is not read.
//!
//! While the output is not read, a program that prints waits in the guest (`console/transmit.rs`),
//! but the kernel's own messages do not wait. A vCPU that prints them waits outside the guest while
//! the output buffer is full, and any other waits there when it next leaves the guest. Those that
//! stay in the guest soon wait for one that is outside: for a lock that it holds, for its answer to
//! an interrupt, for the end of an RCU grace period. After some 20 seconds the guest would report
//! lockups and stalls. So after a short time all are held, as by a pause, and each notifies its
//! guest when it runs again.
//!
//! This module knows the output and pauses; it must not know consoles.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::console::output::Output;
use crate::vm::shared::Shared;

/// For how long the output may not be read before all vCPUs are held. Shorter than what any
/// watchdog of a guest waits for, and longer than what a terminal takes for some screens of text.
const HOLD_AFTER: Duration = Duration::from_secs(1);

/// Starts the thread that pauses the machine of `shared` when `output` is not read. It ends when no
/// more output will come.
///
/// # Errors
/// When the thread cannot be started.
pub fn start(shared: &Arc<Shared>, output: &Output) -> io::Result<()> {
    let shared = Arc::downgrade(shared);
    let output = output.clone();
    thread::Builder::new()
        .name("console-stall".to_owned())
        .spawn(move || {
            while output.wait_until_stalled(HOLD_AFTER) {
                // `None`: the machine is being taken down, or a vCPU does not answer. In the
                // next stall this is tried again.
                let paused = shared
                    .upgrade()
                    .filter(|shared| shared.vcpus.pause().is_ok());
                output.wait_until_not_full();
                if let Some(shared) = paused {
                    let _ = shared.vcpus.resume();
                }
            }
        })?;
    Ok(())
}
