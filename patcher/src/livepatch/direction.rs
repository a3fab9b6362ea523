//! Which way a transition switches tasks.

use crate::report::patch::PatchPhase;

/// Which way a transition switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the new functions.
    Apply,
    /// Back to the previous functions.
    Revert,
}

impl Direction {
    /// The patch state that tasks switch to (`KLP_TRANSITION_PATCHED` is 1,
    /// `KLP_TRANSITION_UNPATCHED` is 0): the value of `klp_target_state`.
    #[must_use]
    pub fn target(self) -> i32 {
        match self {
            Direction::Apply => 1,
            Direction::Revert => 0,
        }
    }

    /// The patch state of tasks that have not switched.
    #[must_use]
    pub fn initial(self) -> i32 {
        1 - self.target()
    }

    /// The other direction, which a reversed transition takes.
    #[must_use]
    pub fn opposite(self) -> Direction {
        match self {
            Direction::Apply => Direction::Revert,
            Direction::Revert => Direction::Apply,
        }
    }

    /// The phase of a patch during a transition in this direction.
    #[must_use]
    pub fn phase(self) -> PatchPhase {
        match self {
            Direction::Apply => PatchPhase::Applying,
            Direction::Revert => PatchPhase::Reverting,
        }
    }
}
