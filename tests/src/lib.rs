//! The product from outside. All of it is in the integration tests of this crate: see `tests/guests/main.rs`.
