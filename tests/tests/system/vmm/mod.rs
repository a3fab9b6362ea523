//! Scenarios of the VMM itself.

pub mod machine;
