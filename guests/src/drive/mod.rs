//! Drives outpatch from outside, as its users do: builds the binary, boots guests, types into their
//! consoles, and calls the command line and the REST API. The tests, the benches and the demo use
//! it.
//!
//! This module knows only what the command line and the API print; it must not know the product's
//! insides.

mod binary;
pub mod console;
mod diagnose;
pub mod emulated;
pub mod guest;
pub mod outpatch;
pub mod rest;

pub use binary::build_outpatch;
pub use console::Console;
pub use emulated::Emulated;
pub use guest::{Guest, GuestSpec, Log, MEMORY_MIB, STOLEN_TIME};
pub use outpatch::{Outpatch, Reply, one_line_refusal};
pub use rest::Rest;
