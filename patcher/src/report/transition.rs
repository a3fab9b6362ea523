//! How far a transition came, and what it cost, as plain data.
use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;

/// A transition that has ended, or as far as it has come.
#[derive(Clone, Debug, Default)]
pub struct TransitionSummary {
    /// Its tasks.
    pub tasks: Vec<TaskReport>,
    /// How long it took.
    pub ms: u64,
    /// What it cost.
    pub pauses: PauseReport,
}
