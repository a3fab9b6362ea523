//! External programs, fetched into the cache: QEMU, and the debuggers drgn and crash, whose results
//! the tests compare with.

pub mod crash;
pub mod drgn;
pub mod qemu;
