//! The product from outside. The tests are the integration tests of this crate (see `tests/guests/main.rs`); here is what they share.

pub mod core_machine;
pub mod faulty;
pub mod listing;
