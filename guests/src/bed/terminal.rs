//! Our own terminal: raw while a command in the bed has one, as it was afterwards.

use std::io::{IsTerminal, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Restores the terminal when dropped.
pub(super) struct Raw(Termios);

impl Raw {
    /// Makes the terminal raw, if input and output are one.
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

pub(super) fn is_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Rows and columns.
pub(super) fn window() -> Option<(u16, u16)> {
    tcgetwinsize(stdout()).ok().map(|w| (w.ws_row, w.ws_col))
}
