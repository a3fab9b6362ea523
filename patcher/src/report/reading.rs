//! What a query read, and why it may be incomplete.

/// What a query read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading<T> {
    /// What was read.
    pub value: T,
    /// Why tasks may be missing, or be listed although they have ended, in one line: the guest
    /// cannot go on, and was in the middle of a change. `None` in any other guest.
    pub warning: Option<String>,
}
