//! Stock kernels, initramfs, sample patches, and the test bed that they run in.

mod apt;
pub mod bed;
pub mod cache;
pub mod cpio;
pub mod crash;
pub mod drgn;
pub mod drive;
pub mod headers;
pub mod initramfs;
pub mod kernels;
pub mod modules;
pub mod no_livepatch;
pub mod packages;
pub mod patches;
pub mod programs;
mod progress;
pub mod qemu;
pub mod sources;
pub mod stock;
pub mod toolchain;
pub mod tools;
