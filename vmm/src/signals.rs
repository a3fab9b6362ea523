//! Signals that end the process, as an event for the event loop, so that the terminal is restored
//! and the output is written first.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, c_int};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

/// Signals belong to the process, so there is one event for it.
static EVENT: OnceLock<EventFd> = OnceLock::new();
static LAST: AtomicI32 = AtomicI32::new(0);

/// Does only what a signal handler may do: stores an atomic, and writes to an eventfd that is never
/// closed.
extern "C" fn on_signal(signal: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    LAST.store(signal, Ordering::SeqCst);
    if let Some(event) = EVENT.get() {
        let _ = event.write(1);
    }
}

/// Catches SIGHUP, SIGINT, SIGQUIT and SIGTERM, except those that were ignored when the process was
/// started, as by nohup(1). Returns the eventfd that is written to for each signal.
///
/// # Errors
/// When the process is out of file descriptors, or a signal cannot be caught.
pub fn catch() -> io::Result<EventFd> {
    if EVENT.get().is_none() {
        let _ = EVENT.set(EventFd::new(libc::EFD_NONBLOCK)?);
        let ignored = ignored_signals();
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            if ignored & (1 << (signal - 1)) == 0 {
                register_signal_handler(signal, on_signal)?;
            }
        }
    }
    LAST.store(0, Ordering::SeqCst);
    EVENT
        .get()
        .ok_or_else(|| io::Error::other("no event for signals"))?
        .try_clone()
}

/// The number of the last signal caught since [`catch`]; 0: none.
#[must_use]
pub fn last() -> c_int {
    LAST.load(Ordering::SeqCst)
}

/// The signals that the process ignores now, as a mask: bit 0 is signal 1.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
