//! Signals: those that end the process, as an event for the event loop, so that the terminal is
//! restored and the output is written first; and those of the terminal's job control.
//!
//! The event loop does not run while the guest is built or taken down, and what it calls can hang:
//! a read of a file on a dead server, a write to a standard error that is not read. So a thread
//! that does nothing else ends the process when it is still there some time after a signal
//! ([`end_on_signals`]).

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use libc::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, c_int};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Error, block_signal, register_signal_handler};

/// How long after the first signal the process may still be there. It ends by itself well before,
/// unless something hangs.
const END_WITHIN: Duration = Duration::from_millis(1400);

/// Signals belong to the process, so there is one event for each kind.
static EVENT: OnceLock<EventFd> = OnceLock::new();
static WATCHDOG: OnceLock<EventFd> = OnceLock::new();
static CONTINUED: OnceLock<EventFd> = OnceLock::new();
static LAST: AtomicI32 = AtomicI32::new(0);

/// What is done before the watchdog ends the process.
type Cleanup = Box<dyn Fn() + Send>;
static CLEANUP: Mutex<Option<Cleanup>> = Mutex::new(None);

/// Does only what a signal handler may do: stores an atomic, and writes to eventfds that are never
/// closed.
extern "C" fn on_signal(signal: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    LAST.store(signal, Ordering::SeqCst);
    for event in [EVENT.get(), WATCHDOG.get()].into_iter().flatten() {
        let _ = event.write(1);
    }
}

/// As [`on_signal`].
extern "C" fn on_continue(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(event) = CONTINUED.get() {
        let _ = event.write(1);
    }
}

/// From now on SIGHUP, SIGINT, SIGQUIT and SIGTERM end the process within 2 seconds with the status
/// 128 + their number, whatever it is doing, except those that were ignored when the process was
/// started, as by nohup(1). [`run_vm`](crate::run_vm) ends the guest in order first, if it can.
///
/// Call this first, before other threads are started: it also decides for the threads to come that
/// a terminal does not stop them (see the crate's `console::terminal`).
///
/// # Errors
/// When the process is out of file descriptors or threads, or a signal cannot be caught.
pub fn end_on_signals() -> io::Result<()> {
    for signal in [SIGTTIN, SIGTTOU] {
        match block_signal(signal) {
            Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => {}
            Err(e) => return Err(io::Error::other(format!("{e:?}"))),
        }
    }
    if WATCHDOG.get().is_none() {
        // Blocking, unlike the event loop's.
        let watchdog = WATCHDOG.get_or_init_event(0)?;
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || end_after_signal(&watchdog))?;
    }
    event().map(drop)
}

/// Creates the event of a cell that has none, and duplicates it.
trait EventCell {
    fn get_or_init_event(&self, flags: c_int) -> io::Result<EventFd>;
}

impl EventCell for OnceLock<EventFd> {
    fn get_or_init_event(&self, flags: c_int) -> io::Result<EventFd> {
        if self.get().is_none() {
            let _ = self.set(EventFd::new(flags)?);
        }
        self.get()
            .ok_or_else(|| io::Error::other("no event for signals"))?
            .try_clone()
    }
}

/// The watchdog's thread. It must not print: standard error may be what hangs.
fn end_after_signal(watchdog: &EventFd) {
    while watchdog.read().is_err() {}
    thread::sleep(END_WITHIN);
    // A cleanup that is being replaced or that panicked is not worth a hang.
    if let Ok(mut cleanup) = CLEANUP.try_lock()
        && let Some(cleanup) = cleanup.take()
    {
        cleanup();
    }
    std::process::exit(last().saturating_add(128));
}

/// Sets what is done when the process must be ended while something in it hangs. It must not wait
/// for anything.
pub(crate) fn before_forced_end(cleanup: impl Fn() + Send + 'static) {
    if let Ok(mut current) = CLEANUP.lock() {
        *current = Some(Box::new(cleanup));
    }
}

/// Catches the signals that [`end_on_signals`] names, if that has not been done. Returns the
/// eventfd that is written to for each, also for one that came before this call.
///
/// # Errors
/// When the process is out of file descriptors, or a signal cannot be caught.
pub(crate) fn event() -> io::Result<EventFd> {
    let first = EVENT.get().is_none();
    let event = EVENT.get_or_init_event(libc::EFD_NONBLOCK)?;
    if first {
        let ignored = ignored_signals();
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            if ignored & (1 << (signal - 1)) == 0 {
                register_signal_handler(signal, on_signal)?;
            }
        }
    }
    Ok(event)
}

/// The eventfd that is written to when the process runs again after it was stopped (SIGCONT).
///
/// # Errors
/// When the process is out of file descriptors, or the signal cannot be caught.
pub(crate) fn continued() -> io::Result<EventFd> {
    let event = CONTINUED.get_or_init_event(libc::EFD_NONBLOCK)?;
    register_signal_handler(SIGCONT, on_continue)?;
    Ok(event)
}

/// The number of the last signal caught; 0: none.
#[must_use]
pub(crate) fn last() -> c_int {
    LAST.load(Ordering::SeqCst)
}

/// The signals that the process ignores now, as a mask: bit 0 is signal 1.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
