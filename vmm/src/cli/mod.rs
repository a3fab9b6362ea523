//! The verbs of the command line: arguments in, exit status out.

#[cfg(test)]
mod abi_tests;
mod check;
mod connection;
mod core;
mod dump;
mod look;
mod module;
mod patches;
mod power;
pub mod run;
mod screen;
mod source;
mod transition;
pub mod verbs;
