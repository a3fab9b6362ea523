//! A small VMM built from rust-vmm's crates. It boots a stock Linux kernel from its bzImage, and
//! lets the patcher pause, read and change the guest while it runs.
//!
//! The binary `outpatch` is this library with a command line (`src/main.rs`, `src/cli/`).
//!
//! # Threads
//!
//! - One thread per vCPU runs `KVM_RUN` and answers I/O exits (`vm/vcpu.rs`). It stops on a command
//!   and a signal from any other thread (`vm/vcpu_set.rs`).
//! - The thread that called [`run_vm`] runs the event loop: standard input, the serial port's
//!   transmitter, signals, and the events that end the guest.
//! - One thread ends the process some time after a signal, if it hangs (`signals.rs`).
//! - One thread writes the guest's output to standard output (`console/output.rs`), and one pauses
//!   the guest while that is not read (`vm/console_stall.rs`).
//! - The control socket's [`Server`](api::Server) has threads of its own, which use the machine
//!   through a [`VmHandle`] and a [`VmMachine`].
//!
//! # Parts
//!
//! | part | does |
//! | --- | --- |
//! | [`api`], [`client`] | the control socket (HTTP and JSON), and a client for it |
//! | `builder.rs`, `run.rs` | build a guest from a [`VmConfig`]; run it until it ends |
//! | `core_dump.rs` | writes a core of a paused guest |
//! | `boot/` | what the guest finds when it starts: kernel, ACPI tables, initial registers |
//! | `vm/` | the VM over KVM: memory, vCPUs and their threads, pauses, handles |
//! | `console/` | the guest's console on our standard input and output |
//! | `devices/` | the devices and their buses |
//!
//! A part uses only parts below it in this table.
//!
//! # What is exported, and who uses it
//!
//! - For the command line: [`run_vm`] with its configuration and result, [`end_on_signals`],
//!   [`api`] and [`client`].
//! - For a program that patches a guest in its own process, as the tests do: [`VmHandle`], the
//!   operator's handle, and [`VmMachine`], which implements [`patcher::Machine`].
//! - For tests that load a core file into memory as [`run_vm`] maps a guest's RAM:
//!   [`prefer_large_pages`].

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
pub use run::{ExitKind, run_vm};
pub use signals::end_on_signals;
pub use vm::handle::VmHandle;
pub use vm::machine::VmMachine;
pub use vm::memslots::prefer_large_pages;
pub use vm::shared::VmState;
pub use vm::vcpu_set::PauseStats;
