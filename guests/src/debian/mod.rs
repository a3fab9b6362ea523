//! Debian's archive: packages by name, downloaded and verified by apt, unpacked in the cache and never installed.

pub(crate) mod apt;
pub mod error;
pub mod packages;
pub mod toolchain;
