//! What the guest prints, on its way to our own standard output, with nothing lost.
//!
//! A vCPU thread must never wait in a `write(2)` to a pipe that nobody reads: it could not be paused there. So vCPU threads only
//! append to a buffer, and one thread of its own does the writing. A buffer that is full makes the vCPU wait where it can be
//! paused ([`Output::is_full`]); a reader that has gone away makes us discard, as a serial line with nothing plugged in would.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// From this many waiting bytes on, vCPUs that print have to wait.
const FULL: usize = 64 << 10;

/// How long the writer lets output gather after the first byte: a serial port gives its bytes one by one, and a wakeup and a
/// system call for each would cost more than the guest's printing.
const GATHER: Duration = Duration::from_millis(1);

/// The guest's output. Clones share it.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// The buffer was empty and is not any more, or no more will come.
    work: Condvar,
    /// The writer has written all there was.
    idle: Condvar,
    /// A copy of `state.buffer.len() >= FULL`, to be looked at after each I/O exit without the lock.
    full: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    buffer: Vec<u8>,
    /// The writer has taken bytes that are not all written yet.
    writing: bool,
    /// No more output will come.
    closed: bool,
    /// The reader has gone; what comes is discarded.
    dead: bool,
}

impl Output {
    /// Starts the thread that writes to `to`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(to: OwnedFd) -> io::Result<(Output, OutputWriter)> {
        let output = Output {
            shared: Arc::default(),
        };
        let shared = Arc::clone(&output.shared);
        let thread = thread::Builder::new()
            .name("console-out".to_owned())
            .spawn(move || shared.write_out(&to))?;
        let writer = OutputWriter {
            output: output.clone(),
            thread: Some(thread),
        };
        Ok((output, writer))
    }

    /// Whether whoever prints should wait before going on.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed)
    }

    /// Waits until all that was printed so far is written, or `deadline` passes; says whether all is written.
    #[must_use]
    pub fn drain(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.shared.lock();
        while !state.buffer.is_empty() || state.writing {
            state = match deadline {
                None => self
                    .shared
                    .idle
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                        return false;
                    };
                    let (state, _) = self
                        .shared
                        .idle
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    state
                }
            };
        }
        true
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        if !state.dead {
            let was_empty = state.buffer.is_empty();
            state.buffer.extend_from_slice(bytes);
            self.shared
                .full
                .store(state.buffer.len() >= FULL, Ordering::Relaxed);
            if was_empty && !state.writing {
                self.shared.work.notify_one();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self, to: &OwnedFd) {
        let mut taken = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.buffer.is_empty() {
                self.idle.notify_all();
            }
            while state.buffer.is_empty() {
                if state.closed {
                    return;
                }
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.writing = true;
            let gather = !state.closed && state.buffer.len() < FULL;
            drop(state);
            if gather {
                thread::sleep(GATHER);
            }
            taken.clear();
            std::mem::swap(&mut self.lock().buffer, &mut taken);
            self.full.store(false, Ordering::Relaxed);
            if let Err(e) = write_all(to, &taken) {
                let mut state = self.lock();
                state.dead = true;
                state.buffer.clear();
                tracing::warn!(
                    "standard output is gone ({e}); the guest's output is discarded from here on"
                );
            }
        }
    }
}

/// `write_all` that also copes with a descriptor somebody else made non-blocking.
fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&to, PollFlags::OUT)], None);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Owns the writing thread: dropping it ends the thread, which first writes what is left unless it is stuck.
#[derive(Debug)]
pub struct OutputWriter {
    output: Output,
    thread: Option<JoinHandle<()>>,
}

impl Drop for OutputWriter {
    fn drop(&mut self) {
        self.output.shared.lock().closed = true;
        self.output.shared.work.notify_one();
        // A thread that is stuck in write(2) cannot be joined; whoever wanted all output written has called `drain`.
        if self
            .output
            .drain(Some(Instant::now() + Duration::from_millis(100)))
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn all_arrives_in_order_before_drain_returns() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all
        });
        let (mut output, writer) = Output::start(ours.into()).unwrap();
        let mut sent = Vec::new();
        for i in 0..300_000_u32 {
            let byte = [i.to_le_bytes()[0]];
            output.write_all(&byte).unwrap();
            sent.extend(byte);
        }
        assert!(output.drain(None));
        drop(writer);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_reader_that_does_not_read_fills_the_buffer_and_then_gets_all_of_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut output, writer) = Output::start(ours.into()).unwrap();
        let mut sent = 0_usize;
        while !output.is_full() {
            output.write_all(&[b'x'; 1000]).unwrap();
            sent += 1000;
            thread::sleep(Duration::from_micros(200));
            assert!(sent < 100 << 20, "the socket swallows everything");
        }
        assert!(!output.drain(Some(Instant::now() + Duration::from_millis(50))));
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all.len()
        });
        assert!(output.drain(None));
        assert!(!output.is_full());
        drop(writer);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_reader_that_leaves_blocks_nobody() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let (mut output, writer) = Output::start(ours.into()).unwrap();
        for _ in 0..1000 {
            output.write_all(&[b'x'; 1000]).unwrap();
        }
        assert!(output.drain(Some(Instant::now() + Duration::from_secs(5))));
        drop(writer);
    }
}
