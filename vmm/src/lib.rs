//! A small VMM: boots a stock kernel from its bzImage, and lets the patcher stop, read and change it while it runs.

#[cfg(test)]
mod abi;
pub mod acpi;
pub mod api;
pub mod boot;
pub mod config;
pub mod cpuid;
pub mod devices;
pub mod dump;
pub mod error;
pub mod firmware;
pub mod handle;
pub mod kvm_run;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod msrs;
pub mod output;
pub mod regs;
pub mod run;
pub mod signals;
pub mod slots;
pub mod stdin;
pub mod terminal;
pub mod vcpu;
pub mod vcpus;
pub mod vm;

pub use config::{BadSize, MAX_CPUS, VmConfig, parse_size};
pub use error::RunError;
pub use handle::{VmHandle, VmState};
pub use machine::VmMachine;
pub use run::{ExitKind, run};
pub use vcpus::PauseStats;
