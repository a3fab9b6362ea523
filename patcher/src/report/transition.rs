//! The summary of a transition: its tasks, its time and its pauses.

use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;

/// A completed transition, or the progress of a running one.
#[derive(Clone, Debug, Default)]
pub struct TransitionSummary {
    /// The tasks; those that have not switched come first.
    pub tasks: Vec<TaskReport>,
    /// How long it has taken, in milliseconds.
    pub ms: u64,
    /// The pauses that it took.
    pub pauses: PauseReport,
}
