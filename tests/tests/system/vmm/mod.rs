//! Scenarios of the VMM itself: nothing is read from the guest, and nothing is patched.

pub mod console;
pub mod machine;
