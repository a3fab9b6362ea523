//! The guest's console on the standard input and output of the process: what the guest prints, what
//! is typed, and the terminal's mode.
//!
//! This module knows COM1 and our own terminal; it must not know vCPUs.

pub mod output;
pub mod stdin;
pub mod terminal;
pub mod transmit;
