//! One function that a patch replaces: its entry, its code, and what serves it.
//!
//! The counterpart of the kernel's `struct klp_func`. Knows addresses and what the entry holds; not
//! the other patches of the function ([`func_stack`](crate::livepatch::func_stack)).

use introspect::{Gva, GvaRange};

use crate::ftrace::site::Site;
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
    pub original: Vec<GvaRange>,
    /// Who serves it with this patch.
    pub new: Target,
    /// Who serves it without.
    pub previous: Target,
    /// The code of that one, where it is a patch's.
    pub previous_code: Vec<GvaRange>,
    /// A newer patch serves it: to this one nothing comes, and its entry is the other's.
    pub superseded_by: Option<Gva>,
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
    pub fn to_previous(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        self.to(self.previous)
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
            Target::Original => self.site.end(),
            Target::Patched(code) => code,
        }
    }

    /// The code that a task must not be in to move to this patch: as `transition.c: klp_check_stack_func` has it, what served until
    /// now; and the original too where it is not what is moved to, as a forced task may still be there.
    pub fn old_code(&self) -> impl Iterator<Item = &GvaRange> {
        let original = match (self.new, self.previous) {
            (Target::Original, Target::Patched(_)) => &[],
            _ => self.original.as_slice(),
        };
        original.iter().chain(&self.previous_code)
    }

    /// The original's code, where that is what this patch makes serve: a task must not be in it to move back.
    #[must_use]
    pub fn original_again(&self) -> &[GvaRange] {
        match self.new {
            Target::Original => &self.original,
            Target::Patched(_) => &[],
        }
    }
}
