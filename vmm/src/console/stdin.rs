//! Sends our standard input to the guest's console, on the event loop.
//!
//! Input that the guest has not taken yet must not be lost, must not grow without bound, and must
//! not make the event loop spin: while much input waits, no more is read. Of a terminal more is
//! read ahead than of a pipe or a file, because Ctrl-A x must reach us also after pasted text that
//! the guest does not take.
//!
//! A terminal is read, and its modes are set, only while this process is in its foreground.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::io::Errno;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::console::terminal::{Keys, RawTerminal};
use crate::devices::legacy::serial::Com1;

/// When this many bytes from a pipe or a file wait for the guest, no more are read.
const MAX_WAITING: usize = 4096;
/// The same for a terminal.
const MAX_WAITING_TYPED: usize = 1 << 20;
/// How many bytes are read at once.
const CHUNK: usize = 1024;
/// How often a process in the background checks whether it is in the foreground: a shell's `fg`
/// does not report that to a job that is running.
const FOREGROUND_CHECK: Duration = Duration::from_millis(200);

/// Whether the input is read, and how the event loop waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InputState {
    /// The event loop reports when the input is readable.
    Watched,
    /// Not watched while input waits for the guest.
    Held,
    /// Not watched while the terminal belongs to another process group.
    Background,
    /// A regular file or similar, which epoll refuses because it is always readable.
    AlwaysReady,
    /// The input has ended.
    Ended,
}

/// An input that is a terminal.
struct TerminalInput {
    raw: RawTerminal,
    /// Written to when the process runs again after it was stopped.
    continued: EventFd,
    /// Expires after [`FOREGROUND_CHECK`] while this process is in the background. It is never
    /// read, which could block: setting it takes the event.
    check: TimerFd,
}

/// The subscriber of the event loop that sends standard input to COM1.
pub struct Stdin<W: Write> {
    input: OwnedFd,
    state: InputState,
    terminal: Option<TerminalInput>,
    keys: Keys,
    com1: Arc<Mutex<Com1<W>>>,
    /// Written to by COM1 when the guest has taken all its input.
    taken: EventFd,
    /// Written to when the user types Ctrl-A x.
    quit: EventFd,
}

impl<W: Write> std::fmt::Debug for Stdin<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stdin")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl<W: Write> Stdin<W> {
    /// Reads `input` for `com1`, which writes to `taken` when the guest has taken all its input.
    /// Writes to `quit` when the user types Ctrl-A x. Switches a terminal to raw mode until this is
    /// dropped; `continued` is written to when the process runs again after it was stopped.
    ///
    /// # Errors
    /// When a terminal cannot be switched, or the process is out of file descriptors.
    pub fn new(
        input: OwnedFd,
        com1: Arc<Mutex<Com1<W>>>,
        taken: EventFd,
        quit: EventFd,
        continued: EventFd,
    ) -> io::Result<Stdin<W>> {
        let terminal = match RawTerminal::open(&input)? {
            None => None,
            Some(raw) => {
                raw.enter()?;
                Some(TerminalInput {
                    raw,
                    continued,
                    check: TimerFd::new()?,
                })
            }
        };
        Ok(Stdin {
            input,
            state: InputState::Held,
            terminal,
            keys: Keys::default(),
            com1,
            taken,
            quit,
        })
    }

    /// A function that restores the terminal's modes, as dropping this does. `None`: the input is
    /// not a terminal.
    pub fn restorer(&self) -> Option<impl Fn() + Send + 'static> {
        self.terminal
            .as_ref()
            .map(|terminal| terminal.raw.restorer())
    }

    fn in_foreground(&self) -> bool {
        self.terminal
            .as_ref()
            .is_none_or(|terminal| terminal.raw.in_foreground())
    }

    /// How many bytes may wait for the guest before no more are read.
    fn max_waiting(&self) -> usize {
        if self.terminal.is_some() {
            MAX_WAITING_TYPED
        } else {
            MAX_WAITING
        }
    }

    fn com1(&self) -> MutexGuard<'_, Com1<W>> {
        self.com1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch the input, or reads it at once if it is always readable.
    fn watch(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(&self.input, EventSet::IN)) {
            Ok(()) => self.state = InputState::Watched,
            Err(event_manager::Error::Epoll(e))
                if io::Error::from(e).raw_os_error() == Some(libc::EPERM) =>
            {
                self.state = InputState::AlwaysReady;
                self.read_always_ready();
            }
            Err(e) => {
                tracing::warn!("standard input cannot be watched ({e:?}): the guest gets none");
                self.state = InputState::Ended;
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps, state: InputState) {
        if let Err(e) = ops.remove(Events::new(&self.input, EventSet::IN)) {
            tracing::warn!("standard input: {e:?}");
        }
        self.state = state;
    }

    fn read_always_ready(&mut self) {
        while self.state == InputState::AlwaysReady && self.com1().waiting() < MAX_WAITING {
            if !self.read() {
                self.state = InputState::Ended;
            }
        }
    }

    /// Reads once. False: the input has ended.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        let count = match rustix::io::read(&self.input, &mut chunk) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return true,
            // The terminal was taken from us just before the read.
            Err(Errno::IO) if !self.in_foreground() => return true,
            Err(e) => {
                tracing::warn!("standard input: {e}");
                return false;
            }
        };
        let mut guest = Vec::with_capacity(count);
        if self
            .keys
            .filter(chunk.get(..count).unwrap_or_default(), &mut guest)
            && let Err(e) = self.quit.write(1)
        {
            tracing::error!("Ctrl-A x is lost: {e}");
        }
        self.com1().send(&guest);
        true
    }

    /// Whether `fd` is one of those after which [`follow_foreground`](Self::follow_foreground) is
    /// called.
    fn is_foreground_event(&mut self, fd: RawFd) -> bool {
        let Some(terminal) = &mut self.terminal else {
            return false;
        };
        if fd == terminal.continued.as_raw_fd() {
            let _ = terminal.continued.read();
            return true;
        }
        fd == terminal.check.as_raw_fd()
    }

    /// Takes the terminal if this process is in its foreground, and leaves it alone otherwise.
    fn follow_foreground(&mut self, ops: &mut EventOps) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        let foreground = terminal.raw.enter().unwrap_or_else(|e| {
            tracing::warn!("the terminal cannot be switched to raw mode: {e}");
            true
        });
        let checks = if foreground {
            terminal.check.clear()
        } else {
            terminal.check.reset(FOREGROUND_CHECK, None)
        };
        if let Err(e) = checks {
            tracing::warn!("the terminal's foreground cannot be followed: {e}");
        }
        match (foreground, self.state) {
            (true, InputState::Background) => self.watch(ops),
            (false, InputState::Watched) => self.unwatch(ops, InputState::Background),
            (false, InputState::Held) => self.state = InputState::Background,
            _ => {}
        }
    }
}

impl<W: Write> MutEventSubscriber for Stdin<W> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(&self.taken, EventSet::IN)) {
            tracing::warn!("console input may stall: {e:?}");
        }
        let Some(terminal) = &self.terminal else {
            return self.watch(ops);
        };
        for fd in [terminal.continued.as_raw_fd(), terminal.check.as_raw_fd()] {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::warn!("the terminal's foreground cannot be followed: {e:?}");
            }
        }
        self.state = InputState::Background;
        self.follow_foreground(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.taken.as_raw_fd() {
            let _ = self.taken.read();
            match self.state {
                InputState::Held => self.watch(ops),
                InputState::AlwaysReady => self.read_always_ready(),
                InputState::Watched | InputState::Background | InputState::Ended => {}
            }
        } else if self.is_foreground_event(events.fd()) || !self.in_foreground() {
            self.follow_foreground(ops);
        } else if !self.read() {
            self.unwatch(ops, InputState::Ended);
        } else if self.com1().waiting() >= self.max_waiting() {
            self.unwatch(ops, InputState::Held);
        }
    }
}

#[cfg(test)]
mod tests;
