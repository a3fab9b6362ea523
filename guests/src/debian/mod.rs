//! Debian's archive: packages are fetched by name, verified by apt, and unpacked into the cache.
//! They are never installed.

pub(crate) mod apt;
pub mod error;
pub mod packages;
pub mod toolchain;
