//! The verbs of the command line: arguments in, exit status out.

#[cfg(test)]
mod abi_tests;
mod connection;
mod look;
mod patches;
mod power;
pub mod run;
mod screen;
mod transition;
pub mod verbs;
