//! The devices of the machine: pure state machines behind a bus. None knows of KVM, threads or files.

pub mod bus;
pub mod legacy;

pub use bus::{Bus, Buses, Device, Effect};
