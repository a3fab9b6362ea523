//! Scenarios of reading a guest: tasks, stacks, symbols, core dumps.

pub mod core_dumps;
pub mod differential;
pub mod flavours;
pub mod locks;
pub mod stacks;
pub mod symbols;
