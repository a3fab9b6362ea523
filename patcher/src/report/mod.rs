//! The reports that callers of this crate get: plain data on a guest, its patches and their
//! transitions, one subject per file.
//!
//! Most of these types are serialised as JSON by the VMM's API. Their field names are promised in
//! `docs/ABI`. This module knows no guest memory and decides nothing.

pub mod check;
pub mod patch;
pub mod pause;
pub mod reading;
pub mod stack;
pub mod task;
pub mod transition;
