//! One patch in one guest: what it replaces, where it lies, and where it is in its life.

use introspect::stacks::Unwinder;
use introspect::stacks_code::RegionId;
use introspect::{Gva, GvaRange};

use crate::look::Watch;
use crate::module::Image;
use crate::place::Piece;
use crate::redirect::{self, EncodeError, SITE_LEN};
use crate::site::Site;
use crate::status::{FunctionReport, PatchPhase, PatchStatus};
use crate::transition::{Past, Transition};

/// One function that is replaced.
#[derive(Clone, Debug)]
pub struct Redirect {
    /// Its name in the guest.
    pub name: String,
    /// Which of several of that name.
    pub sympos: u64,
    /// The old function's body, and parts of it that lie elsewhere (`.cold`).
    pub old: Vec<GvaRange>,
    /// The new function.
    pub new: Gva,
    /// The old function's entry.
    pub site: Site,
    /// The stub that its entry goes through in a transition.
    pub stub: Gva,
}

impl Redirect {
    /// What the site holds in a transition.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_stub(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        redirect::jump(self.site.at, self.stub)
    }

    /// What the site holds when the patch is applied.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn to_new(&self) -> Result<[u8; SITE_LEN], EncodeError> {
        redirect::jump(self.site.at, self.new)
    }
}

/// A patch.
#[derive(Debug)]
pub struct Patch {
    /// The module, linked for its place.
    pub image: Image,
    /// Its functions.
    pub redirects: Vec<Redirect>,
    /// Its code and stubs.
    pub code: Piece,
    /// What stands in `code`.
    pub code_bytes: Vec<u8>,
    /// Its data, if it has any.
    pub data: Option<Piece>,
    /// The part of `code` that is stubs.
    pub stubs: GvaRange,
    /// Its unwind data in the unwinder, if it has any.
    pub region: Option<RegionId>,
    /// Where it is in its life.
    pub phase: PatchPhase,
    /// A transition of it was forced: nobody knows any more who is in its code, so that stays.
    pub forced: bool,
    /// The transition that runs.
    pub transition: Option<Transition>,
    /// The last one that ended.
    pub past: Past,
}

impl Patch {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.image.name
    }

    /// The code that a task must have left before it can be switched to the new functions.
    #[must_use]
    pub fn old_code(&self) -> Watch {
        let mut watch = Watch::new();
        for redirect in &self.redirects {
            for part in &redirect.old {
                watch.add(*part, redirect.name.clone());
            }
        }
        watch.add(self.stubs, format!("the entry stubs of {}", self.name()));
        watch
    }

    /// The code that a task must have left before it can be switched back to the old functions.
    #[must_use]
    pub fn new_code(&self) -> Watch {
        let mut watch = Watch::new();
        for function in self.image.symbols.iter().filter(|symbol| symbol.function) {
            let range = GvaRange::new(function.address, function.address.add(function.size));
            watch.add(range, format!("{} of {}", function.name, self.name()));
        }
        // Whatever else there is: its read-only data is no place for a frame either.
        watch.add(self.code.range, self.name());
        watch
    }

    /// Takes what the unwinder knows of it out again.
    pub fn forget(&self, unwinder: &mut Unwinder) {
        unwinder.remove_busy(self.stubs);
        if let Some(region) = self.region {
            unwinder.remove_region(region);
        }
    }

    /// What is to be said of it.
    #[must_use]
    pub fn status(&self) -> PatchStatus {
        let past = match &self.transition {
            Some(running) => running.so_far(),
            None => self.past.clone(),
        };
        PatchStatus {
            name: self.name().into(),
            phase: self.phase,
            enabled: matches!(self.phase, PatchPhase::Applying | PatchPhase::Applied),
            transition: self.transition.is_some(),
            force: self.forced,
            signal: self.transition.as_ref().is_some_and(Transition::signals),
            functions: self
                .redirects
                .iter()
                .map(|redirect| FunctionReport {
                    object: "vmlinux".into(),
                    name: redirect.name.clone(),
                    sympos: redirect.sympos,
                    patched: self.phase != PatchPhase::Reverted,
                })
                .collect(),
            tasks: past.tasks,
            transition_ms: past.ms,
            pauses: past.pauses,
        }
    }
}
