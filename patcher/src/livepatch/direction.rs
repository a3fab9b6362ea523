//! Which way a transition switches tasks.

use crate::report::patch::PatchPhase;

/// Which way tasks move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the new code.
    Apply,
    /// Back to the old code.
    Revert,
}

impl Direction {
    /// The patch state that tasks move to (`KLP_TRANSITION_UNPATCHED`, `_PATCHED`).
    #[must_use]
    pub fn target(self) -> i32 {
        match self {
            Direction::Apply => 1,
            Direction::Revert => 0,
        }
    }

    /// The other way.
    #[must_use]
    pub fn back(self) -> Direction {
        match self {
            Direction::Apply => Direction::Revert,
            Direction::Revert => Direction::Apply,
        }
    }

    /// What a patch that moves this way is doing.
    #[must_use]
    pub fn phase(self) -> PatchPhase {
        match self {
            Direction::Apply => PatchPhase::Applying,
            Direction::Revert => PatchPhase::Reverting,
        }
    }

    pub fn initial(self) -> i32 {
        1 - self.target()
    }
}
