//! The verbs of the command line: arguments in, exit status out.

mod check;

pub mod commands;
mod core_guest;
mod dump;
mod inspect;
mod lifecycle;
mod module;
mod output;
mod patches;
mod progress;
pub mod run;
mod source;
