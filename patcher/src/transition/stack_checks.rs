//! The stack checks: whether each task of a paused guest may switch.
//!
//! This is the one place that decides it, as `kernel/livepatch/transition.c: klp_check_stack` does
//! in the kernel: a task may switch if its stack is reliable and has no frame in code that the task
//! must leave first. The stacks come from the [`GuestView`]; which code that is, the
//! [`Patch`](crate::livepatch::patch::Patch) says. This module only reads.

use introspect::task_list::CachedTask;
use introspect::{Task, Verdict};

use crate::error::StepError;
use crate::guest::code_set::CodeSet;
use crate::guest::view::GuestView;
use crate::report::task::SwitchedBy;
use crate::transition::progress::{Blocked, Outcome};

/// Whether a task is in code of a [`CodeSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StackCheck {
    /// It is not, so it may be switched; this is how that is known.
    Clear(SwitchedBy),
    /// It is: in this frame.
    Blocked(String),
    /// That is not known: this is why its stack is unreliable.
    Unknown(String),
}

impl<'a> GuestView<'a> {
    /// Checks whether task `at` is in `code`: its stack must be reliable, and no frame of it in
    /// `code` (`kernel/livepatch/transition.c: klp_check_stack`, `klp_check_stack_func`). Unlike
    /// the kernel, this checks running tasks too: their vCPUs are stopped.
    #[must_use]
    pub fn check_stack(&self, at: usize, code: &CodeSet) -> StackCheck {
        if self.is_known_clear(at, code) {
            return StackCheck::Clear(SwitchedBy::Stack);
        }
        match self.cached().get(at) {
            Some(cached) => self.check_stack_of(cached, code),
            None => StackCheck::Unknown("there is no such task".into()),
        }
    }

    fn check_stack_of(&self, cached: &'a CachedTask, code: &CodeSet) -> StackCheck {
        let stack = self.stack(cached);
        if let Verdict::Unreliable(reason) = &stack.verdict {
            return StackCheck::Unknown(self.describe_unreliable(&stack, &reason.to_string()));
        }
        if let Some((frame, (range, name))) = code.first_frame_in(&stack) {
            return StackCheck::Blocked(self.describe_frame(frame, *range, name));
        }
        match self.vcpu_of(&cached.task) {
            Some(vcpu) if vcpu.cpl == 3 => StackCheck::Clear(SwitchedBy::UserMode),
            _ => StackCheck::Clear(SwitchedBy::Stack),
        }
    }

    /// Checks that no task that a vCPU runs is in `code`.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first task that is, or may be.
    pub fn check_no_vcpu_in(&self, code: &CodeSet) -> Result<(), StepError> {
        let each = self.running();
        check_all_clear(each.map(|cached| (&cached.task, self.check_stack_of(cached, code))))
    }

    /// Checks that no task is in `code`.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first task that is, or may be.
    pub fn check_no_task_in(&self, code: &CodeSet) -> Result<(), StepError> {
        let each = self.cached().iter().enumerate();
        check_all_clear(each.map(|(at, cached)| (&cached.task, self.check_stack(at, code))))
    }
}

fn check_all_clear<'t>(
    mut each: impl Iterator<Item = (&'t Task, StackCheck)>,
) -> Result<(), StepError> {
    let found = each.find_map(|(task, check)| match check {
        StackCheck::Clear(_) => None,
        StackCheck::Blocked(blocker) | StackCheck::Unknown(blocker) => Some((task, blocker)),
    });
    match found {
        None => Ok(()),
        Some((task, blocker)) => Err(StepError::Busy(format!(
            "{} ({}): {blocker}",
            task.comm, task.pid
        ))),
    }
}

/// The stack check of each task, by the task's number in the [`GuestView`]. Nearly all tasks are
/// clear by their stack, so only the results of the others are kept.
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
