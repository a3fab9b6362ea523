//! What a guest finds when it starts: its kernel and command line in memory, the ACPI tables, the registers of its vCPUs.

pub mod acpi;
pub mod bzimage;
pub mod reset_vector;
pub mod vcpu_state;
