//! The commands: arguments in, text or JSON on standard output, and an exit status.

mod args;
mod check;
pub mod commands;
mod core_guest;
mod dump;
mod error;
mod inspect;
mod lifecycle;
mod module;
pub mod output;
mod patches;
mod progress;
pub mod run;
mod source;
mod status;
mod summary;
