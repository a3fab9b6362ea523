//! Where all tasks of a look stand.
//!
//! Made in the pause for every task of the guest, of whom nearly all are clean by their stack: only the others are kept.

use crate::guest::view::StackCheck;
use crate::report::task::SwitchedBy;
use crate::transition::progress::{Blocked, Outcome};

/// Where each of many tasks stands, by its number.
#[derive(Clone, Debug)]
pub(super) struct StackChecks {
    len: usize,
    /// Those that are not as [`MOST`], with rising numbers.
    others: Vec<(usize, StackCheck)>,
}

const MOST: StackCheck = StackCheck::Clear(SwitchedBy::Stack);

impl StackChecks {
    /// Asks where each of `len` tasks stands.
    pub(super) fn ask(len: usize, stand: impl Fn(usize) -> StackCheck) -> StackChecks {
        let each = (0..len).map(|at| (at, stand(at)));
        let others = each.filter(|(_, check)| *check != MOST).collect();
        StackChecks { len, others }
    }

    /// Whether everybody is clean.
    pub(super) fn are_clear(&self) -> bool {
        self.others.iter().all(|(_, check)| is_clear(check))
    }

    /// Whether task number `at` is.
    pub(super) fn is_clear(&self, at: usize) -> bool {
        let other = self.others.binary_search_by_key(&at, |(other, _)| *other);
        let other = other.ok().and_then(|found| self.others.get(found));
        other.is_none_or(|(_, check)| is_clear(check))
    }

    /// Those who may not be, with their numbers.
    pub(super) fn not_clear(&self) -> impl Iterator<Item = (usize, &StackCheck)> {
        let others = self.others.iter().map(|(at, check)| (*at, check));
        others.filter(|(_, check)| !is_clear(check))
    }

    /// What to enter for each.
    pub(super) fn into_outcomes(self) -> Vec<Outcome> {
        let most = || Outcome::from(MOST);
        let mut outcomes: Vec<Outcome> = std::iter::repeat_with(most).take(self.len).collect();
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
            StackCheck::Clear(way) => Outcome::Switched(Some(way)),
            StackCheck::Blocked(why) | StackCheck::Unknown(why) => {
                Outcome::Blocked(Box::new(Blocked {
                    why,
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
    fn each_is_told_as_it_was_asked() {
        let all = [
            StackCheck::Clear(SwitchedBy::Stack),
            StackCheck::Blocked("in f".into()),
            StackCheck::Clear(SwitchedBy::KernelExit),
            StackCheck::Clear(SwitchedBy::Stack),
            StackCheck::Unknown("torn".into()),
        ];
        for len in 0..=all.len() {
            let asked = StackChecks::ask(len, |at| all[at].clone());
            let all = &all[..len];
            assert_eq!(asked.are_clear(), all.iter().all(is_clear));
            for (at, check) in all.iter().enumerate() {
                assert_eq!(asked.is_clear(at), is_clear(check), "{at} of {len}");
            }
            let not_clear: Vec<_> = all
                .iter()
                .enumerate()
                .filter(|(_, s)| !is_clear(s))
                .collect();
            assert!(asked.not_clear().eq(not_clear), "{len}");
            let outcomes: Vec<Outcome> = all.iter().cloned().map(Outcome::from).collect();
            assert_eq!(asked.into_outcomes(), outcomes);
        }
    }
}
