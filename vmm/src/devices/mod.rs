//! The devices of the machine: pure state machines behind a bus. None knows of KVM, threads or files.

pub mod bus;
pub mod cmos;
pub mod i8042;
pub mod power;
pub mod serial;

pub use bus::{Bus, Device, Effect};
