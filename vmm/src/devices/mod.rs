//! The devices of the machine: state machines that answer on a bus.
//!
//! A device knows its registers, and writes to eventfds for its interrupts; it must not know KVM or
//! vCPU threads. [`bus`] finds the device for an address; [`legacy`] has the PC's devices at fixed
//! ports.
//!
//! Virtio devices belong in a folder beside it, `virtio/`: the MMIO transport, which answers on
//! [`Buses::mmio`], and a file per device. The state of a device that a snapshot saves is a type in
//! that device's file; writing and reading snapshots is not the devices' (`src/snapshot/`).

pub mod bus;
pub mod legacy;

pub use bus::{Bus, Buses, Device, Effect};
