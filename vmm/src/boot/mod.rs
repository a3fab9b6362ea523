//! What a guest finds when it starts: its kernel, initrd and command line in memory, the ACPI
//! tables, the code at the reset vector, and the registers of its vCPUs.
//!
//! This module knows the boot protocol and where things are in guest memory (`crate::layout`); it
//! must not know threads or how the guest is run.

pub mod acpi;
pub mod bzimage;
pub mod reset_vector;
pub mod vcpu_state;
