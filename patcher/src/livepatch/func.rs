//! One function that a patch replaces: its entry, its code, and which function its calls reach.
//!
//! This is the counterpart of the kernel's `struct klp_func`. This module knows addresses and what
//! the entry holds, not the other patches of the function
//! ([`func_stack`](crate::livepatch::func_stack)).

use introspect::{Gva, GvaRange};

use crate::ftrace::site::Site;
use crate::x86::{self, EncodeError, SITE_LEN};

/// The function that calls reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The kernel's own function.
    Original,
    /// A patch's function, at this address.
    Patched(Gva),
}

/// One function that is replaced.
#[derive(Clone, Debug)]
pub struct PatchedFunction {
    /// The function's name in the guest.
    pub name: String,
    /// Which of several symbols of that name it is, from 1; 0 if it is the only one.
    pub sympos: u64,
    /// The original's body, and parts of it that lie elsewhere (`.cold`).
    pub original: Vec<GvaRange>,
    /// The function that calls reach with this patch.
    pub new: Target,
    /// The function that calls reach without this patch.
    pub previous: Target,
    /// The code of `previous`, if that is a patch's.
    pub previous_code: Vec<GvaRange>,
    /// The newer patch's function that the calls reach, if any: then the entry belongs to the newer
    /// patch, and no call reaches this one.
    pub superseded_by: Option<Gva>,
    /// The original's entry.
    pub site: Site,
    /// The stub through which calls go during a transition.
    pub stub: Gva,
}

impl PatchedFunction {
    /// The bytes of the entry during a transition of this patch.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_stub(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        x86::jump(self.site.at, self.stub)
    }

    /// The bytes of the entry when the patch is applied.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_new(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        self.to(self.new)
    }

    /// The bytes of the entry without the patch.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_previous(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        self.to(self.previous)
    }

    fn to(&self, target: Target) -> Result<[u8; SITE_LEN], EncodeError> {
        match target {
            Target::Original => Ok(self.site.nop),
            Target::Patched(code) => x86::jump(self.site.at, code),
        }
    }

    /// The address at which the stub enters `target`: past the entry of the original, or the start
    /// of a patch's function.
    #[must_use]
    pub fn address_of(&self, target: Target) -> Gva {
        match target {
            Target::Original => self.site.end(),
            Target::Patched(code) => code,
        }
    }

    /// The code that a task must not be in to switch to this patch: that of the previous function,
    /// as `kernel/livepatch/transition.c: klp_check_stack_func` has it. The original's code is in
    /// it too unless calls reach the original next, as a forced task may still be there.
    pub fn code_to_leave(&self) -> impl Iterator<Item = &GvaRange> {
        let original = match (self.new, self.previous) {
            (Target::Original, Target::Patched(_)) => &[],
            _ => self.original.as_slice(),
        };
        original.iter().chain(&self.previous_code)
    }

    /// The original's code, if this patch makes calls reach the original again: a task must not be
    /// in it to switch back.
    #[must_use]
    pub fn restored_original(&self) -> &[GvaRange] {
        match self.new {
            Target::Original => &self.original,
            Target::Patched(_) => &[],
        }
    }
}
