//! The stack checks of all tasks in one pause.
//!
//! Made in the pause for every task of the guest. Nearly all tasks are clear by their stack, so
//! only the results of the others are kept.

use crate::guest::view::StackCheck;
use crate::report::task::SwitchedBy;
use crate::transition::progress::{Blocked, Outcome};

/// The stack check of each task, by the task's number in the [`GuestView`].
///
/// [`GuestView`]: crate::guest::view::GuestView
#[derive(Clone, Debug)]
pub(super) struct StackChecks {
    len: usize,
    /// The results other than [`COMMON`], by rising number of the task.
    others: Vec<(usize, StackCheck)>,
}

/// The result of nearly all tasks.
const COMMON: StackCheck = StackCheck::Clear(SwitchedBy::Stack);

impl StackChecks {
    /// Checks tasks 0 to `len`, each with `check`.
    pub(super) fn collect(len: usize, check: impl Fn(usize) -> StackCheck) -> StackChecks {
        let each = (0..len).map(|at| (at, check(at)));
        let others = each.filter(|(_, check)| *check != COMMON).collect();
        StackChecks { len, others }
    }

    /// Whether all tasks are clear.
    pub(super) fn are_clear(&self) -> bool {
        self.others.iter().all(|(_, check)| is_clear(check))
    }

    /// Whether task `at` is clear.
    pub(super) fn is_clear(&self, at: usize) -> bool {
        let other = self.others.binary_search_by_key(&at, |(other, _)| *other);
        let other = other.ok().and_then(|found| self.others.get(found));
        other.is_none_or(|(_, check)| is_clear(check))
    }

    /// The tasks that are not clear, by number.
    pub(super) fn not_clear(&self) -> impl Iterator<Item = (usize, &StackCheck)> {
        let others = self.others.iter().map(|(at, check)| (*at, check));
        others.filter(|(_, check)| !is_clear(check))
    }

    /// The outcome for each task: those that are clear switch.
    pub(super) fn into_outcomes(self) -> Vec<Outcome> {
        let common = || Outcome::from(COMMON);
        let mut outcomes: Vec<Outcome> = std::iter::repeat_with(common).take(self.len).collect();
        for (at, check) in self.others {
            if let Some(outcome) = outcomes.get_mut(at) {
                *outcome = check.into();
            }
        }
        outcomes
    }
}

fn is_clear(check: &StackCheck) -> bool {
    matches!(check, StackCheck::Clear(_))
}

impl From<StackCheck> for Outcome {
    fn from(check: StackCheck) -> Outcome {
        match check {
            StackCheck::Clear(by) => Outcome::Switched(Some(by)),
            StackCheck::Blocked(blocker) | StackCheck::Unknown(blocker) => {
                Outcome::Blocked(Box::new(Blocked {
                    blocker,
                    signalled: false,
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_is_kept_as_it_was_collected() {
        let all = [
            StackCheck::Clear(SwitchedBy::Stack),
            StackCheck::Blocked("in f".into()),
            StackCheck::Clear(SwitchedBy::KernelExit),
            StackCheck::Clear(SwitchedBy::Stack),
            StackCheck::Unknown("torn".into()),
        ];
        for len in 0..=all.len() {
            let checks = StackChecks::collect(len, |at| all[at].clone());
            let all = &all[..len];
            assert_eq!(checks.are_clear(), all.iter().all(is_clear));
            for (at, check) in all.iter().enumerate() {
                assert_eq!(checks.is_clear(at), is_clear(check), "{at} of {len}");
            }
            let not_clear: Vec<_> = all
                .iter()
                .enumerate()
                .filter(|(_, check)| !is_clear(check))
                .collect();
            assert!(checks.not_clear().eq(not_clear), "{len}");
            let outcomes: Vec<Outcome> = all.iter().cloned().map(Outcome::from).collect();
            assert_eq!(checks.into_outcomes(), outcomes);
        }
    }
}
