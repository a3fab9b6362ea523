//! Our own terminal: raw while the guest's console is on it and restored however the process ends;
//! and the keys that are for us and not for the guest.
//!
//! A terminal belongs to its foreground process group. From the background its modes are not ours
//! to set, and the kernel stops a process that tries to (SIGTTOU), or that reads (SIGTTIN;
//! `drivers/tty/tty_jobctrl.c: __tty_check_change`, `drivers/tty/n_tty.c: job_control`). So both
//! are done in the foreground only. As the terminal can be taken away after the check, `outpatch
//! run` also blocks these signals (`crate::signals`): a read then fails with EIO, and what the
//! guest prints is written.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

/// A terminal that is in raw mode while this process is in its foreground. Dropping this restores
/// the previous mode, also during a panic.
#[derive(Debug)]
pub struct RawTerminal {
    modes: Arc<Modes>,
}

/// Shared with the function that restores the modes when the process is forced to end.
#[derive(Debug)]
struct Modes {
    terminal: OwnedFd,
    /// The modes to restore. `None`: the terminal is as we found it.
    before: Mutex<Option<Termios>>,
}

impl RawTerminal {
    /// Uses `terminal`, without setting its modes. `None`: it is not a terminal.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn open(terminal: impl AsFd) -> std::io::Result<Option<RawTerminal>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let modes = Modes {
            terminal: terminal.as_fd().try_clone_to_owned()?,
            before: Mutex::new(None),
        };
        Ok(Some(RawTerminal {
            modes: Arc::new(modes),
        }))
    }

    /// Whether this process may read the terminal and set its modes.
    pub fn in_foreground(&self) -> bool {
        self.modes.in_foreground()
    }

    /// Switches the terminal to raw mode if this process is in its foreground, also when it was
    /// switched before: a shell sets modes of its own while it is in the foreground. False: this
    /// process is in the background, and nothing was done.
    ///
    /// # Errors
    /// When the terminal cannot be switched to raw mode.
    pub fn enter(&self) -> std::io::Result<bool> {
        if !self.in_foreground() {
            return Ok(false);
        }
        let found = tcgetattr(&self.modes.terminal)?;
        let mut raw = found.clone();
        raw.make_raw();
        if let Ok(mut before) = self.modes.before.lock() {
            // A shell may have restored the raw modes that it saved when it stopped us.
            let is_raw = found.local_modes == raw.local_modes
                && found.input_modes == raw.input_modes
                && found.output_modes == raw.output_modes;
            if before.is_none() || !is_raw {
                *before = Some(found);
            }
        }
        set(&self.modes.terminal, &raw)?;
        Ok(true)
    }

    /// A function that does what dropping this does, without waiting for anything.
    pub fn restorer(&self) -> impl Fn() + Send + 'static {
        let modes = Arc::clone(&self.modes);
        move || modes.restore()
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.modes.restore();
    }
}

impl Modes {
    /// A terminal that is not our controlling terminal (or has gone) has no foreground for us, and
    /// the kernel restricts nothing.
    fn in_foreground(&self) -> bool {
        tcgetpgrp(&self.terminal).map_or(true, |foreground| foreground == getpgrp())
    }

    fn restore(&self) {
        // A thread that holds the lock is switching the modes: it cannot be waited for.
        if let Ok(mut before) = self.before.try_lock()
            && let Some(before) = before.take()
            && self.in_foreground()
        {
            let _ = set(&self.terminal, &before);
        }
    }
}

fn set(terminal: &OwnedFd, modes: &Termios) -> Result<(), Errno> {
    loop {
        match tcsetattr(terminal, OptionalActions::Now, modes) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// Takes our own keys out of what is typed, as QEMU's `-nographic` does: Ctrl-A x quits, Ctrl-A
/// Ctrl-A sends one Ctrl-A, and Ctrl-A with any other key sends nothing.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends those bytes of `typed` that are for the guest to `guest`. True: the user quits.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x') => return true,
                (false, _) | (true, ESCAPE) => guest.push(byte),
                (true, _) => {}
            }
        }
        false
    }
}

/// Pseudo-terminals for tests.
#[cfg(test)]
pub(crate) mod testing {
    use std::fs::File;

    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    /// A new terminal: the user's end, and the end for a program. It becomes no process's
    /// controlling terminal.
    pub(crate) fn pty() -> (File, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let user = openpt(flags).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let program = ioctl_tiocgptpeer(&user, flags).unwrap();
        (user.into(), program)
    }

    /// Whether `terminal` is in the modes of a shell and not raw.
    pub(crate) fn is_cooked(terminal: impl AsFd) -> bool {
        let modes = tcgetattr(terminal).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        let quit = pieces.iter().any(|piece| keys.filter(piece, &mut guest));
        (guest, quit)
    }

    #[test]
    fn keys_as_in_qemu() {
        assert_eq!(filter(&[b"ls x\r"]), (b"ls x\r".to_vec(), false));
        assert_eq!(filter(&[b"a\x01xb"]), (b"a".to_vec(), true));
        assert_eq!(
            filter(&[b"a\x01", b"xb"]),
            (b"a".to_vec(), true),
            "split between two reads"
        );
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01qx"]), (b"x".to_vec(), false));
        assert_eq!(
            filter(&[&[0, 255, 3]]),
            (vec![0, 255, 3], false),
            "Ctrl-C is the guest's"
        );
    }
}
