//! The product from outside. The tests are the integration tests of this crate (see `tests/system/main.rs`); here is what they share.

pub mod core_machine;
pub mod fault_machine;
pub mod sleeper_cores;
pub mod task_listing;
