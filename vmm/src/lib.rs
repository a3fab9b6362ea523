//! A small VMM: boots a stock kernel from its bzImage, and lets the patcher stop, read and change it while it runs.

#[cfg(test)]
mod abi;
pub mod api;
mod boot;
mod builder;
pub mod client;
mod config;
mod console;
mod core_dump;
mod devices;
mod error;
mod layout;
mod run;
mod signals;
mod vm;

pub use config::{BadSize, MAX_CPUS, VmConfig, parse_size};
pub use error::RunError;
pub use run::{ExitKind, run};
pub use vm::handle::VmHandle;
pub use vm::machine::VmMachine;
pub use vm::memslots::prefer_large_pages;
pub use vm::shared::VmState;
pub use vm::vcpu_set::PauseStats;
