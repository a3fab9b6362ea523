//! This process's terminal: puts it into raw mode while a command in the bed has a terminal, and
//! restores it afterwards.

use std::io::{IsTerminal, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal in raw mode, restored when this is dropped.
pub(super) struct Raw(Termios);

impl Raw {
    /// Puts the terminal into raw mode, if standard input and output are terminals.
    pub(super) fn enter() -> Option<Raw> {
        if !is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Whether both standard input and output are terminals.
pub(super) fn is_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// The terminal's rows and columns.
pub(super) fn size() -> Option<(u16, u16)> {
    tcgetwinsize(stdout()).ok().map(|w| (w.ws_row, w.ws_col))
}
