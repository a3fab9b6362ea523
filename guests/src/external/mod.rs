//! Programs that are not ours, which tests compare with: QEMU, drgn and crash.

pub mod crash;
pub mod drgn;
pub mod qemu;
