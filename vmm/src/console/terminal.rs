//! Our own terminal: raw while the guest's console is on it and restored however the process ends;
//! and the keys that are for us and not for the guest.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// A terminal in raw mode. Dropping this restores the previous mode, also during a panic.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Switches `terminal` to raw mode. `None`: it is not a terminal.
    ///
    /// # Errors
    /// When it is a terminal and cannot be switched to raw mode.
    pub fn enter(terminal: impl AsFd) -> std::io::Result<Option<RawTerminal>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        set(&terminal, &raw)?;
        Ok(Some(RawTerminal { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = set(&self.terminal, &self.before);
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
