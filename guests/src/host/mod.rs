//! The host: the cache folder, the programs that it must have, and progress on its terminal.

pub mod cache;
pub mod error;
pub(crate) mod progress;
pub mod tools;
