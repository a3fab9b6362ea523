//! The checks of a step: that the guest is as outpatch left it, the outcome for each task, and
//! whether the transition may complete.
//!
//! Each single stack is checked in [`stack_checks`](crate::transition::stack_checks); the guest's
//! locks and variables are checked in [`preconditions`].

use introspect::{PatchState, Task};

use crate::error::{PatchError, StepError};
use crate::ftrace::site::SiteError;
use crate::guest::code_set::{CodeName, CodeSet};
use crate::livepatch::direction::Direction;
use crate::livepatch::func::PatchedFunction;
use crate::report::task::SwitchedBy;
use crate::transition::preconditions::{self, NO_STATE};
use crate::transition::progress::Outcome;
use crate::transition::stack_checks::StackCheck;
use crate::transition::stack_checks::StackChecks;
use crate::transition::step::StepContext;
use crate::x86::{self, SITE_LEN};

impl StepContext<'_> {
    /// Checks the stack of every task whose patch state is `wanted` (`klp_try_switch_task`,
    /// `klp_check_stack`). The others are taken to be clear.
    pub(super) fn check_stacks(
        &self,
        direction: Direction,
        wanted: impl Fn(i32) -> bool,
    ) -> StackChecks {
        let code = self.patch.code_to_leave(direction);
        let check = |at| match self.view.patch_state(at) {
            _ if !wanted(self.state(at)) => StackCheck::Clear(SwitchedBy::Stack),
            Some(PatchState::Invalid(state)) => StackCheck::Unknown(format!(
                "its patch_state is {state}, which no kernel writes"
            )),
            _ => self.view.check_stack(at, &code),
        };
        StackChecks::collect(self.view.cached().len(), check)
    }

    /// The patch state of task `at`.
    pub(super) fn state(&self, at: usize) -> i32 {
        match (self.pending, self.view.cached().get(at)) {
            (Some(pending), Some(cached)) if pending.contains(cached.task.addr) => {
                pending.direction().initial()
            }
            (Some(pending), _) => pending.direction().target(),
            (None, _) => state_value(self.view.patch_state(at)),
        }
    }

    /// The outcome for each task. Tasks in state `target` have switched already, by `switched_by`.
    pub(super) fn outcomes(
        &self,
        checks: &StackChecks,
        target: i32,
        switched_by: Option<SwitchedBy>,
    ) -> Vec<Outcome> {
        let mut outcomes = checks.clone().into_outcomes();
        for (at, outcome) in outcomes.iter_mut().enumerate() {
            if self.state(at) == target {
                *outcome = Outcome::Switched(switched_by);
            }
        }
        outcomes
    }

    /// Why not all tasks can be switched in this pause. A task that is in a patched function is
    /// named rather than one whose stack is unreliable: the latter is often elsewhere by the next
    /// pause.
    pub(super) fn not_at_once(&self, checks: &StackChecks) -> StepError {
        let (mut inside, mut unknown) = (Vec::new(), Vec::new());
        for (at, check) in checks.not_clear() {
            let Some(cached) = self.view.cached().get(at) else {
                continue;
            };
            match check {
                StackCheck::Clear(_) => {}
                StackCheck::Blocked(blocker) => inside.push((&cached.task, blocker)),
                StackCheck::Unknown(blocker) => unknown.push((&cached.task, blocker)),
            }
        }
        let mut blocked = inside.into_iter().chain(unknown);
        match blocked.next() {
            Some((task, blocker)) => StepError::Failed(PatchError::NotAtOnce {
                blocker: format!("{} {} {blocker}", task.pid, task.comm),
                others: blocked.count(),
            }),
            None => StepError::Busy("a vCPU is between two tasks".into()),
        }
    }

    /// All tasks have switched. Checks whether the transition may complete: no task may be in code
    /// that is about to be freed (in the kernel `klp_complete_transition` waits for that, with
    /// `klp_synchronize_transition`).
    pub(super) fn can_complete(&self, direction: Direction) -> Result<(), StepError> {
        self.view.check_vcpus_have_tasks()?;
        self.view.check_no_vcpu_in(&self.switching_code())?;
        if direction == Direction::Revert && self.patch.forced {
            // Tasks may stay in the new code: it is not freed.
            self.check_text()?;
        } else if direction == Direction::Apply {
            self.check_replaced_code()?;
            self.check_still_unused(direction)?;
        } else {
            self.check_still_unused(direction)?;
            // A task that has switched can still be in a stub, on its way to the previous function.
            self.view.check_no_task_in(&self.patch.new_code())?;
            self.check_text()?;
        }
        Ok(())
    }

    /// Checks that no task is in the code of patches that are freed when this one is applied.
    pub(super) fn check_replaced_code(&self) -> Result<(), StepError> {
        if self.patch.replaces.is_empty() {
            return Ok(());
        }
        self.view.check_no_task_in(&self.patch.replaced_code())?;
        self.check_text()
    }

    /// Checks that the running transition is the one that outpatch started, and that the entries
    /// are as it left them.
    pub(super) fn check_our_transition(&self, direction: Direction) -> Result<(), StepError> {
        let memory = &self.view.memory;
        if let (Some(klp), Some(dummy)) = (&self.info.klp, self.dummy) {
            preconditions::check_our_transition(memory, klp, direction.target(), dummy)?;
        }
        self.check_sites(|function| Ok(function.to_stub()?))
    }

    /// Checks that the kernel's text and ftrace's records may be changed now.
    pub(super) fn check_text(&self) -> Result<(), StepError> {
        preconditions::check_locks(&self.view.memory, self.info)?;
        preconditions::check_text_poke(self.view.kernel, &self.view.memory, self.info)
    }

    /// Checks that no task has a patch state, as is the case outside transitions.
    pub(super) fn check_patch_states(&self) -> Result<(), StepError> {
        let other = |(at, _): &(usize, &Task)| self.state(*at) != NO_STATE;
        match self.view.tasks().enumerate().find(other) {
            None => Ok(()),
            Some((_, task)) => Err(StepError::Busy(format!(
                "{} ({}) has a patch state already",
                task.comm, task.pid
            ))),
        }
    }

    /// Checks that the entries are as they must be before a transition in this direction.
    pub(super) fn check_sites_before(&self, direction: Direction) -> Result<(), StepError> {
        match direction {
            Direction::Apply => self.check_sites(|function| Ok(function.to_previous()?)),
            Direction::Revert => self.check_sites(|function| Ok(function.to_new()?)),
        }
    }

    /// Checks that the entry of every function holds the `expected` bytes, or those of a newer
    /// patch, and that ftrace's record of it says the same.
    fn check_sites(
        &self,
        expected: impl Fn(&PatchedFunction) -> Result<[u8; SITE_LEN], PatchError>,
    ) -> Result<(), StepError> {
        let (memory, layout) = (&self.view.memory, &self.info.ftrace);
        for function in &self.patch.functions {
            let site = &function.site;
            let bytes = match function.superseded_by {
                Some(newer) => x86::jump(site.at, newer).map_err(PatchError::from)?,
                None => expected(function)?,
            };
            let disabled = bytes != site.nop;
            let as_expected = site.holds(memory, bytes)?
                && site.is_disabled(memory, layout)? == disabled
                && (disabled || !site.has_users(memory, layout)?);
            if !as_expected {
                return Err(StepError::Failed(PatchError::Site {
                    function: function.name.clone(),
                    at: site.at,
                    source: SiteError::Changed,
                }));
            }
        }
        Ok(())
    }

    /// The kernel code that changes a task's patch state and TIF_PATCH_PENDING.
    pub(super) fn switching_code(&self) -> CodeSet {
        let mut code = CodeSet::new();
        for (range, name) in self.info.klp.iter().flat_map(|klp| &klp.switching) {
            code.add(*range, CodeName::Kernel((*name).into()));
        }
        code
    }
}

/// The patch state as the kernel's value; [`NO_STATE`] in a kernel that has none.
fn state_value(state: Option<PatchState>) -> i32 {
    match state {
        None | Some(PatchState::Idle) => NO_STATE,
        Some(PatchState::Unpatched) => 0,
        Some(PatchState::Patched) => 1,
        Some(PatchState::Invalid(other)) => other,
    }
}
