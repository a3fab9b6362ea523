//! What the tests, the benches and the demo run on: stock kernels, initramfs images, sample
//! patches, the test bed, and drivers for guests and for the `outpatch` command line.
//!
//! This crate must not know the insides of `vmm`, `patcher` and `introspect`: only their command
//! line and API.

pub mod bed;
pub mod debian;
pub mod drive;
pub mod external;
pub mod host;
pub mod initramfs;
pub mod kernel;
