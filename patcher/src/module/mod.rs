//! A livepatch module, from the unmodified `.ko` file to bytes that are ready for one guest.
//!
//! [`parse`] reads the file and refuses what is not supported; [`link()`] does from outside what
//! the kernel's module loader does from inside. This module knows the formats and the kernel's
//! rules; it writes nothing to a guest, and is given the addresses to link for.

mod error;
mod file;
mod kernel;
mod link;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use error::{LinkError, ModuleError, TargetError};
pub use file::klp::KlpPatch;
pub use file::layout::{LoadAddresses, RegionSize, Sizes};
pub use file::{LivepatchModule, parse};
pub use kernel::guest::GuestTarget;
pub use link::image::{Image, OrcRecord};
pub use link::resolve::resolve_function;
pub use link::{check_version, examine, link};
