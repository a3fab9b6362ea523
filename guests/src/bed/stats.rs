//! How many nested beds this process has started, and how many of them died.

use std::sync::atomic::{AtomicU64, Ordering};

static STARTED: AtomicU64 = AtomicU64::new(0);
static LOST: AtomicU64 = AtomicU64::new(0);

/// Numbers of nested beds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Beds started.
    pub started: u64,
    /// Beds that died without being stopped.
    pub lost: u64,
}

/// The nested beds of this process so far.
pub fn counts() -> Counts {
    Counts {
        started: STARTED.load(Ordering::Relaxed),
        lost: LOST.load(Ordering::Relaxed),
    }
}

pub(super) fn add_started() {
    STARTED.fetch_add(1, Ordering::Relaxed);
}

pub(super) fn add_lost() {
    LOST.fetch_add(1, Ordering::Relaxed);
}
