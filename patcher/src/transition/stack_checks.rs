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
        let others = each.filter(|(_, standing)| *standing != MOST).collect();
        StackChecks { len, others }
    }

    /// Whether everybody is clean.
    pub(super) fn are_clean(&self) -> bool {
        self.others.iter().all(|(_, standing)| is_clean(standing))
    }

    /// Whether task number `at` is.
    pub(super) fn is_clean(&self, at: usize) -> bool {
        let other = self.others.binary_search_by_key(&at, |(other, _)| *other);
        let other = other.ok().and_then(|found| self.others.get(found));
        other.is_none_or(|(_, standing)| is_clean(standing))
    }

    /// Those who may not be, with their numbers.
    pub(super) fn unclean(&self) -> impl Iterator<Item = (usize, &StackCheck)> {
        let others = self.others.iter().map(|(at, standing)| (*at, standing));
        others.filter(|(_, standing)| !is_clean(standing))
    }

    /// What to enter for each.
    pub(super) fn into_findings(self) -> Vec<Outcome> {
        let most = || Outcome::from(MOST);
        let mut findings: Vec<Outcome> = std::iter::repeat_with(most).take(self.len).collect();
        for (at, standing) in self.others {
            if let Some(finding) = findings.get_mut(at) {
                *finding = standing.into();
            }
        }
        findings
    }
}

fn is_clean(standing: &StackCheck) -> bool {
    matches!(standing, StackCheck::Clear(_))
}

impl From<StackCheck> for Outcome {
    fn from(standing: StackCheck) -> Outcome {
        match standing {
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
            assert_eq!(asked.are_clean(), all.iter().all(is_clean));
            for (at, standing) in all.iter().enumerate() {
                assert_eq!(asked.is_clean(at), is_clean(standing), "{at} of {len}");
            }
            let unclean: Vec<_> = all
                .iter()
                .enumerate()
                .filter(|(_, s)| !is_clean(s))
                .collect();
            assert!(asked.unclean().eq(unclean), "{len}");
            let findings: Vec<Outcome> = all.iter().cloned().map(Outcome::from).collect();
            assert_eq!(asked.into_findings(), findings);
        }
    }
}
