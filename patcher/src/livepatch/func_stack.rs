//! The stack of patches on a function: who serves its calls, and who would without the newest.
//!
//! As the kernel has it (`kernel/livepatch/patch.c: klp_ops.func_stack`): the newest patch of a function serves it; in that patch's
//! transition, tasks that have not moved get the one below, down to the original. A patch that replaces all earlier ones
//! (`klp_patch.replace`) has, for each function that only they patch, a function that is the original again
//! (`core.c: klp_add_object_nops`). Knows patches and addresses; nothing of guest memory.

use introspect::{Gva, GvaRange};

use crate::ftrace::site::Site;
use crate::livepatch::patch::Patch;
use crate::x86::{self, EncodeError, SITE_LEN};

/// Where calls of a function go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the kernel's own.
    Original,
    /// To a patch's.
    Patched(Gva),
}

/// One function that is replaced.
#[derive(Clone, Debug)]
pub struct PatchedFunction {
    /// Its name in the guest.
    pub name: String,
    /// Which of several of that name.
    pub sympos: u64,
    /// The original's body, and parts of it that lie elsewhere (`.cold`).
    pub body: Vec<GvaRange>,
    /// Who serves it with this patch.
    pub new: Target,
    /// Who serves it without.
    pub below: Target,
    /// The code of that one, where it is a patch's.
    pub below_code: Vec<GvaRange>,
    /// A newer patch serves it: to this one nothing comes, and its entry is the other's.
    pub covered_by: Option<Gva>,
    /// The original's entry.
    pub site: Site,
    /// The stub that its entry goes through in a transition.
    pub stub: Gva,
}

impl PatchedFunction {
    /// What the entry holds in a transition of this patch.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_stub(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        x86::jump(self.site.at, self.stub)
    }

    /// What it holds when the patch is applied.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_new(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        self.to(self.new)
    }

    /// What it holds without the patch.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_below(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        self.to(self.below)
    }

    fn to(&self, callee: Target) -> Result<[u8; SITE_LEN], EncodeError> {
        match callee {
            Target::Original => Ok(self.site.nop),
            Target::Patched(code) => x86::jump(self.site.at, code),
        }
    }

    /// Where the stub goes on for a callee.
    #[must_use]
    pub fn code_of(&self, callee: Target) -> Gva {
        match callee {
            Target::Original => self.site.behind(),
            Target::Patched(code) => code,
        }
    }

    /// The code that a task must not be in to move to this patch: as `transition.c: klp_check_stack_func` has it, what served until
    /// now; and the original too where it is not what is moved to, as a forced task may still be there.
    pub fn old_code(&self) -> impl Iterator<Item = &GvaRange> {
        let body = match (self.new, self.below) {
            (Target::Original, Target::Patched(_)) => &[],
            _ => self.body.as_slice(),
        };
        body.iter().chain(&self.below_code)
    }

    /// The original's code, where that is what this patch makes serve: a task must not be in it to move back.
    #[must_use]
    pub fn original_again(&self) -> &[GvaRange] {
        match self.new {
            Target::Original => &self.body,
            Target::Patched(_) => &[],
        }
    }
}

/// The newest of `patches` that has a function of this body, and its part of it.
pub fn top<'p>(patches: &'p [Patch], body: &GvaRange) -> Option<(&'p Patch, &'p PatchedFunction)> {
    patches.iter().rev().find_map(|patch| {
        let mut redirects = patch.redirects.iter();
        let redirect = redirects.find(|redirect| redirect.body.contains(body))?;
        Some((patch, redirect))
    })
}

/// What a new patch needs to know of a function that other patches have: who serves it now, and where that lies.
pub fn below(patches: &[Patch], body: &GvaRange) -> (Target, Vec<GvaRange>) {
    match top(patches, body) {
        None => (Target::Original, Vec::new()),
        Some((patch, redirect)) => match redirect.new {
            Target::Original => (Target::Original, Vec::new()),
            Target::Patched(code) => (redirect.new, patch.function_code(code)),
        },
    }
}

/// Every function that `patches` have, by the newest of each.
pub fn all(patches: &[Patch]) -> Vec<&PatchedFunction> {
    let mut all: Vec<&PatchedFunction> = Vec::new();
    let newest_first = patches.iter().rev().flat_map(|patch| &patch.redirects);
    for redirect in newest_first {
        if !all.iter().any(|known| known.site.at == redirect.site.at) {
            all.push(redirect);
        }
    }
    all
}

/// Notes at each function of the patch `at` whether a newer one serves it.
pub fn note_covers(patches: &mut [Patch], at: usize) {
    let (older, newer) = patches.split_at_mut(at.saturating_add(1));
    let Some(patch) = older.last_mut() else {
        return;
    };
    for redirect in &mut patch.redirects {
        let newest = redirect
            .body
            .first()
            .and_then(|body| top(newer, body))
            .map(|(_, other)| other.code_of(other.new));
        redirect.covered_by = newest;
    }
}

/// Takes a patch that is gone out of the stacks of the others.
pub fn forget(patches: &mut [Patch], gone: &Patch) {
    for redirect in patches.iter_mut().flat_map(|patch| &mut patch.redirects) {
        let was_below = gone
            .redirects
            .iter()
            .find(|old| old.site.at == redirect.site.at && old.new == redirect.below);
        if let Some(old) = was_below {
            redirect.below = old.below;
            redirect.below_code.clone_from(&old.below_code);
        }
    }
}
