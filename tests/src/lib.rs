//! Tests of the product from outside, on stock kernels. They are the integration tests of this
//! crate (see `tests/system/main.rs`) and its benches; this library has what they share.

pub mod core_machine;
pub mod fault_machine;
pub mod sleeper_cores;
pub mod task_listing;
