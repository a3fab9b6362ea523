//! What runs the scenarios: what each of them is given, and what is counted and kept over all of them.

pub mod fixture;
pub mod kept_cores;
pub mod shared_guest;
