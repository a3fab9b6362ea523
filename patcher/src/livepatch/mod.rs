//! A livepatch in a guest: its functions, which function the calls of each reach, and how it is
//! prepared.
//!
//! This is the counterpart of `kernel/livepatch/core.c` and `patch.c`. Callbacks (`callbacks.rs`),
//! `klp_state`s (`state.rs`) and shadow variables (`shadow.rs`) of livepatches belong here as well.
//! This module must not decide when a task may switch: that is [`transition`](crate::transition).

pub mod allocations;
pub mod direction;
pub mod dummy_patch;
pub mod func;
pub mod func_stack;
pub mod patch;
pub mod prepare;
