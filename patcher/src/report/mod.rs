//! What is told of a guest, its patches and their transitions, by subject.

pub mod check;
pub mod patch;
pub mod pause;
pub mod stack;
pub mod task;
pub mod transition;
