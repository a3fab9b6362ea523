//! Writes what the guest prints to our standard output, without losing any of it.
//!
//! A vCPU thread must never wait in `write(2)`, for example to a pipe that is not read: it could
//! not be paused there. So vCPU threads only append to a buffer, and a separate thread writes it.
//! When much is in it, a guest that prints with interrupts gets none ([`Output::has_room`]).
//! When it is full all the same, vCPUs wait where they can be paused ([`Output::is_full`]); when it
//! stays full, the whole machine is paused ([`Output::wait_until_stalled`]). When the reader has
//! gone, output is discarded, as on a serial line with nothing plugged in.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// When this many bytes wait to be written, vCPUs that print must wait.
const FULL: usize = 64 << 10;

/// When this many bytes wait to be written, a guest that prints with interrupts gets none. Its
/// other work goes on, and what its kernel prints without interrupts still fits.
const NO_MORE_ROOM: usize = 32 << 10;

/// How long the writer lets output gather after the first byte. A serial port gives its bytes one
/// by one; a wakeup and a system call for each would cost more than the guest's printing.
const GATHER: Duration = Duration::from_millis(1);

/// The buffer of the guest's output. Clones share it.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Notified when the buffer is no longer empty, or no more output will come.
    work: Condvar,
    /// Notified when the writer has written the whole buffer.
    idle: Condvar,
    /// Notified when the buffer has become full or is no longer full, or no more output will come.
    full_changed: Condvar,
    /// A copy of [`State::is_full`], read after each I/O exit without the lock.
    full: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    buffer: Vec<u8>,
    /// How often the writer has taken the buffer's contents.
    taken: u64,
    /// The writer has taken bytes that are not all written yet.
    writing: bool,
    /// No more output will come.
    closed: bool,
    /// The reader has gone; output is discarded.
    dead: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.buffer.len() >= FULL
    }
}

impl Output {
    /// Starts the thread that writes the output to `to`.
    ///
    /// # Errors
    /// When the thread cannot be started.
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

    /// Whether a vCPU that prints must wait before it enters the guest again.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed)
    }

    /// Whether the guest may go on printing without a vCPU that must wait soon.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.shared.lock().buffer.len() < NO_MORE_ROOM
    }

    /// Waits until the buffer is full and its contents have not been taken for `after`. False: no
    /// more output will come.
    #[must_use]
    pub fn wait_until_stalled(&self, after: Duration) -> bool {
        let mut state = self.shared.lock();
        while !state.closed {
            if !state.is_full() {
                state = self
                    .shared
                    .full_changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let taken = state.taken;
            let (next, waited) = self
                .shared
                .full_changed
                .wait_timeout_while(state, after, |state| {
                    !state.closed && state.is_full() && state.taken == taken
                })
                .unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return true;
            }
            state = next;
        }
        false
    }

    /// Waits until the buffer is not full, or no more output will come.
    pub fn wait_until_not_full(&self) {
        drop(
            self.shared
                .full_changed
                .wait_while(self.shared.lock(), |state| !state.closed && state.is_full()),
        );
    }

    /// Waits until all output so far is written or `deadline` passes. True: all is written.
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
            let was_full = state.is_full();
            state.buffer.extend_from_slice(bytes);
            if !was_full && state.is_full() {
                self.shared.set_full(true);
            }
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

    /// Called with `state` locked.
    fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
        self.full_changed.notify_all();
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
            let mut state = self.lock();
            std::mem::swap(&mut state.buffer, &mut taken);
            state.taken += 1;
            self.set_full(false);
            drop(state);
            if let Err(e) = write_all(to, &taken) {
                let mut state = self.lock();
                state.dead = true;
                state.buffer.clear();
                // It may have been full again: no vCPU may wait for a reader that has gone.
                self.set_full(false);
                drop(state);
                tracing::warn!(
                    "standard output is gone ({e}); the guest's output is discarded from here on"
                );
            }
        }
    }
}

/// Writes all of `bytes`, also to a descriptor that another process has made non-blocking.
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

/// Owns the writing thread. Dropping it ends the thread, which first writes what is left, unless it
/// is stuck in a write.
#[derive(Debug)]
pub struct OutputWriter {
    output: Output,
    thread: Option<JoinHandle<()>>,
}

impl Drop for OutputWriter {
    fn drop(&mut self) {
        self.output.shared.lock().closed = true;
        self.output.shared.work.notify_one();
        self.output.shared.full_changed.notify_all();
        // A thread that is stuck in write(2) cannot be joined. A caller that needs all output to be
        // written has called `drain`.
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

    /// Writes until the writer waits in a write and the buffer is full. Returns how much.
    fn fill(output: &mut Output) -> usize {
        let mut sent = 0;
        loop {
            while !output.is_full() {
                output.write_all(&[b'x'; 1000]).unwrap();
                sent += 1000;
                assert!(sent < 100 << 20, "the socket swallows everything");
            }
            // A writer that was only not scheduled takes the buffer now.
            thread::sleep(Duration::from_millis(100));
            if output.is_full() {
                return sent;
            }
        }
    }

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
        let sent = fill(&mut output);
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
    fn a_reader_that_leaves_after_a_stall_holds_no_vcpu() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut output, writer) = Output::start(ours.into()).unwrap();
        fill(&mut output);
        assert!(output.wait_until_stalled(Duration::from_millis(50)));
        drop(theirs);
        let deadline = Instant::now() + Duration::from_secs(5);
        while output.is_full() {
            assert!(Instant::now() < deadline, "it stays full");
            thread::sleep(Duration::from_millis(1));
        }
        output.wait_until_not_full();
        drop(writer);
        assert!(!output.wait_until_stalled(Duration::ZERO));
    }

    #[test]
    fn a_reader_that_leaves_does_not_block_the_guest() {
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
