//! Scenarios of reading a guest: its tasks, stacks and symbols, running, paused and from core
//! files.

pub mod core_dumps;
pub mod dead_guests;
pub mod differential;
pub mod flavours;
pub mod locks;
pub mod stacks;
pub mod symbols;
pub mod traced_stacks;
