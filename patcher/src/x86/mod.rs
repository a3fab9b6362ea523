//! Instructions that are written into a guest.

pub mod entry_stub;
