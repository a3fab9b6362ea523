//! The guest's console on the terminal that started it.

pub mod output;
pub mod stdin;
pub mod terminal;
