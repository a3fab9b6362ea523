//! A guest's serial console. A thread reads it all the time, so that the VMM never blocks on it.

use std::io::{Read, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What the guest has printed so far, and whether the console is closed.
#[derive(Debug, Default)]
struct Printed {
    bytes: Vec<u8>,
    closed: bool,
}

/// A serial console: the guest's output, and input for the guest.
#[derive(Debug)]
pub struct Console {
    input: ChildStdin,
    printed: Arc<(Mutex<Printed>, Condvar)>,
    /// Offset of the first byte that no wait has consumed yet.
    consumed: usize,
}

impl Console {
    /// Takes over a VMM's standard input and output.
    #[must_use]
    pub fn new(input: ChildStdin, mut output: ChildStdout) -> Console {
        let printed = Arc::new((Mutex::new(Printed::default()), Condvar::new()));
        let shared = Arc::clone(&printed);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            loop {
                let got = output.read(&mut chunk).unwrap_or(0);
                let mut state = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.bytes.extend_from_slice(&chunk[..got]);
                state.closed = got == 0;
                shared.1.notify_all();
                if got == 0 {
                    return;
                }
            }
        });
        Console {
            input,
            printed,
            consumed: 0,
        }
    }

    /// Everything that the guest has printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        let state = self
            .printed
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&state.bytes).into_owned()
    }

    /// Reads nothing for `time`, but for a chunk or two.
    pub fn stall(&self, time: Duration) {
        // The thread that reads must store what it has read.
        let _state = self
            .printed
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        thread::sleep(time);
    }

    /// Types `text` on the console.
    ///
    /// # Errors
    /// When the VMM no longer reads its standard input.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.input
            .write_all(text.as_bytes())
            .and_then(|()| self.input.flush())
            .context("the VMM does not read its console")
    }

    /// Waits until the guest prints `marker`. Returns what it printed since the last wait,
    /// including the marker.
    ///
    /// # Errors
    /// When the console closes or `limit` passes first. The error has the console's last lines.
    pub fn wait_for(&mut self, marker: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        // Output arrives in small pieces: what was searched already is not searched again.
        let mut searched = self.consumed;
        let mut state = self
            .printed
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = find(&state.bytes[searched..], marker.as_bytes()) {
                let end = searched + at + marker.len();
                let text = String::from_utf8_lossy(&state.bytes[self.consumed..end]).into_owned();
                self.consumed = end;
                return Ok(text);
            }
            searched = (state.bytes.len() + 1)
                .saturating_sub(marker.len())
                .max(searched);
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                let event = if state.closed { "closed" } else { "was silent" };
                let tail =
                    String::from_utf8_lossy(&state.bytes[state.bytes.len().saturating_sub(3000)..])
                        .into_owned();
                bail!(
                    "the console {event} before it printed {marker:?} (limit {limit:?}); \
                     its last lines:\n{tail}"
                );
            }
            state = self
                .printed
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len())
        .position(|window| window == needle)
}
