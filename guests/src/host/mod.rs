//! The machine that all this runs on: the cache folder, the programs that it must have, progress on its terminal.

pub mod cache;
pub mod error;
pub(crate) mod progress;
pub mod tools;
