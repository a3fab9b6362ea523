//! What a step does about the code that the guest's kernel knows: it is registered in the pause that
//! writes it, and its registration ends in the one that frees it, after the jumps to it are gone.
//!
//! What is written is planned by [`registration`]; this module knows which patches it concerns.

use crate::error::{PatchError, StepError};
use crate::livepatch::direction::Direction;
use crate::memory::Allocation;
use crate::memory::grace_period::GracePeriod;
use crate::registration::{self, Registration};
use crate::transition::step::{Step, StepContext};

/// A patch whose code is freed when the transition completes.
pub(super) struct FreedPatch<'a> {
    pub name: &'a str,
    pub code: Allocation,
    pub registration: &'a Registration,
    /// Its instructions, as they were written.
    pub text: &'a [u8],
}

impl StepContext<'_> {
    /// The patches whose code is freed when a transition in this direction completes: those that the
    /// patch replaces, or itself.
    pub(super) fn freed(&self, direction: Direction) -> Vec<FreedPatch<'_>> {
        let patch = self.patch;
        match direction {
            Direction::Apply => {
                let replaced = patch.replaces.iter().filter(|old| !old.stays);
                let freed = replaced.map(|old| FreedPatch {
                    name: &old.name,
                    code: old.code,
                    registration: &old.registration,
                    text: &old.text,
                });
                freed.collect()
            }
            Direction::Revert if patch.keeps_code() => Vec::new(),
            Direction::Revert => vec![FreedPatch {
                name: patch.name(),
                code: patch.code,
                registration: &patch.registration,
                text: &patch.image.code,
            }],
        }
    }

    /// Checks, before a transition starts, that nothing else in the guest uses code that it frees.
    /// The transition that applies a patch can always be reversed.
    ///
    /// # Errors
    /// [`PatchError::InUse`].
    pub(super) fn check_unused(&self, direction: Direction) -> Result<(), StepError> {
        match self.in_use(direction)? {
            Some(used) => Err(StepError::Failed(used)),
            None => Ok(()),
        }
    }

    /// Checks the same before the transition completes: the end of such a use is waited for.
    ///
    /// # Errors
    /// [`StepError::Busy`].
    pub(super) fn check_still_unused(&self, direction: Direction) -> Result<(), StepError> {
        match self.in_use(direction)? {
            Some(used) => Err(StepError::Busy(used.to_string())),
            None => Ok(()),
        }
    }

    fn in_use(&self, direction: Direction) -> Result<Option<PatchError>, StepError> {
        let kprobes = self.info.registration.kprobes.as_ref();
        for freed in self.freed(direction) {
            let memory = &self.view.memory;
            if let Some(source) = freed.registration.user(memory, kprobes, freed.text)? {
                return Ok(Some(PatchError::InUse {
                    patch: freed.name.into(),
                    source,
                }));
            }
        }
        Ok(None)
    }

    /// Plans the registration of the patch, if the step starts to apply it, and the end of that of
    /// code that is freed, if the step completes the transition.
    pub(super) fn plan_registration(
        &self,
        direction: Direction,
        (starts, completes): (bool, bool),
        step: &mut Step,
    ) -> Result<(), StepError> {
        let (memory, layout) = (&self.view.memory, &self.info.registration);
        let starts = starts && direction == Direction::Apply;
        let add: &[&Registration] = if starts {
            &[&self.patch.registration]
        } else {
            &[]
        };
        let freed = if completes {
            self.freed(direction)
        } else {
            Vec::new()
        };
        let remove: Vec<&Registration> = freed.iter().map(|it| it.registration).collect();
        let change = (add, remove.as_slice());
        registration::plan(memory, layout, self.patch_memory, change, &mut step.writes)?;
        if completes {
            step.grace_period = Some(GracePeriod::after(memory.u64(layout.gp_seq)?));
        }
        Ok(())
    }
}
