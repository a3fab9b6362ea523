//! What is told of a guest, its patches and their transitions, by subject.

pub mod patch;
pub mod stack;
