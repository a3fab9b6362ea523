//! Driving outpatch from outside, as its users do: the binary, a guest's console, the command line.
//!
//! Knows nothing of the product's insides but what its command line prints. The tests and the demo stand on it.

mod binary;
pub mod console;
mod diagnose;
pub mod emulated;
pub mod guest;
pub mod outpatch;
pub mod rest;

pub use binary::build_outpatch;
pub use emulated::Emulated;
pub use guest::{Guest, GuestSpec, Log, MEMORY_MIB, STOLEN_TIME};
pub use outpatch::{Outpatch, Reply, one_line_refusal};
pub use rest::Rest;
