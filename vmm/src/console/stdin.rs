//! Our standard input on its way to the guest's console, on the event loop.
//!
//! Input that the guest does not take yet must neither be lost nor grow without end nor make us spin. A pipe or a file is not
//! read further while much is waiting. A terminal is read on, because Ctrl-A x must get through to us even when the guest has
//! stopped listening; what is typed at such a guest beyond that is lost, as it would be on a serial line.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::io::Errno;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::console::terminal::Keys;
use crate::devices::legacy::serial::Com1;

/// From this many waiting bytes on, no more are read.
const ENOUGH: usize = 4096;
/// How much is read at once.
const CHUNK: usize = 1024;

/// Where the input comes from, as far as that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Readiness is an event.
    Watched,
    /// Readable, but not watched at the moment.
    Held,
    /// A regular file or the like: epoll refuses it because it is always ready.
    AlwaysReady,
    /// There is no more.
    Ended,
}

/// Moves standard input to the console.
pub struct Stdin<W: Write> {
    input: OwnedFd,
    source: Source,
    terminal: bool,
    keys: Keys,
    com1: Arc<Mutex<Com1<W>>>,
    /// The console has given all its input to the guest.
    taken: EventFd,
    /// The user quits.
    quit: EventFd,
}

impl<W: Write> std::fmt::Debug for Stdin<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stdin")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl<W: Write> Stdin<W> {
    /// Reads `input` for `com1`, which writes to `taken`; writes to `quit` when the user types Ctrl-A x.
    pub fn new(
        input: OwnedFd,
        com1: Arc<Mutex<Com1<W>>>,
        taken: EventFd,
        quit: EventFd,
    ) -> Stdin<W> {
        let terminal = rustix::termios::isatty(&input);
        Stdin {
            input,
            source: Source::Held,
            terminal,
            keys: Keys::default(),
            com1,
            taken,
            quit,
        }
    }

    fn com1(&self) -> MutexGuard<'_, Com1<W>> {
        self.com1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch for readiness.
    fn watch(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(&self.input, EventSet::IN)) {
            Ok(()) => self.source = Source::Watched,
            Err(event_manager::Error::Epoll(e))
                if io::Error::from(e).raw_os_error() == Some(libc::EPERM) =>
            {
                self.source = Source::AlwaysReady;
                self.read_always_ready();
            }
            Err(e) => {
                tracing::warn!("standard input cannot be watched ({e:?}): the guest gets none");
                self.source = Source::Ended;
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps, source: Source) {
        if let Err(e) = ops.remove(Events::new(&self.input, EventSet::IN)) {
            tracing::warn!("standard input: {e:?}");
        }
        self.source = source;
    }

    fn read_always_ready(&mut self) {
        while self.source == Source::AlwaysReady && self.com1().waiting() < ENOUGH {
            if !self.read() {
                self.source = Source::Ended;
            }
        }
    }

    /// Reads what there is, once; false: there will be no more.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        let count = match rustix::io::read(&self.input, &mut chunk) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return true,
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
        let mut com1 = self.com1();
        if !self.terminal || com1.waiting() < ENOUGH {
            com1.send(&guest);
        }
        true
    }
}

impl<W: Write> MutEventSubscriber for Stdin<W> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(&self.taken, EventSet::IN)) {
            tracing::warn!("console input may stall: {e:?}");
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.taken.as_raw_fd() {
            let _ = self.taken.read();
            match self.source {
                Source::Held => self.watch(ops),
                Source::AlwaysReady => self.read_always_ready(),
                Source::Watched | Source::Ended => {}
            }
        } else if !self.read() {
            self.unwatch(ops, Source::Ended);
        } else if !self.terminal && self.com1().waiting() >= ENOUGH {
            self.unwatch(ops, Source::Held);
        }
    }
}
