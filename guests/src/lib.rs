//! Stock kernels, initramfs, sample patches, and the test bed that they run in.

pub mod bed;
pub mod debian;
pub mod drive;
pub mod external;
pub mod host;
pub mod initramfs;
pub mod kernel;
