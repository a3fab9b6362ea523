//! A livepatch in a guest: its functions, what serves each of them, and how it is prepared.
//!
//! The counterpart of the kernel's `kernel/livepatch/core.c` and `patch.c`.

pub mod direction;
pub mod dummy_patch;
pub mod func;
pub mod func_stack;
pub mod patch;
pub mod prepare;
