//! One patch in one guest: what it replaces, where it lies, and where it is in its life.

use introspect::unwind::RegionId;
use introspect::unwind::Unwinder;
use introspect::{Gva, GvaRange};

use crate::guest::code_set::CodeSet;
use crate::livepatch::direction::Direction;
use crate::livepatch::func::{PatchedFunction, Target};
use crate::memory::Allocation;
use crate::module::Image;
use crate::report::patch::{FunctionReport, PatchPhase, PatchStatus};
use crate::report::transition::TransitionSummary;
use crate::transition::Transition;

/// A patch that another one takes the place of.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// Its name.
    pub name: String,
    /// Its code and stubs.
    pub code: Allocation,
    /// Its code stays: somebody may be in it for ever.
    pub stays: bool,
}

/// A patch.
#[derive(Debug)]
pub struct Patch {
    /// The module, linked for its place.
    pub image: Image,
    /// Its functions.
    pub functions: Vec<PatchedFunction>,
    /// Its code and stubs.
    pub code: Allocation,
    /// What stands in `code`.
    pub code_bytes: Vec<u8>,
    /// Its data, if it has any.
    pub data: Option<Allocation>,
    /// The table that its stubs look tasks up in, in a guest that keeps no states of its own.
    pub table: Option<Allocation>,
    /// The part of `code` that is stubs.
    pub stubs: GvaRange,
    /// In the guest they lead to where an older patch was that is gone.
    pub stubs_changed: bool,
    /// The patches that it takes the place of, by their code.
    pub replaces: Vec<Replaced>,
    /// Its unwind data in the unwinder, if it has any.
    pub region: Option<RegionId>,
    /// Where it is in its life.
    pub phase: PatchPhase,
    /// A transition of it was forced: nobody knows any more who is in its code, so that stays.
    pub forced: bool,
    /// The last one that ended.
    pub past: TransitionSummary,
}

impl Patch {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.image.name
    }

    /// The code of its function at `new`, parts of it that lie elsewhere included.
    #[must_use]
    pub fn function_code(&self, new: Gva) -> Vec<GvaRange> {
        let functions = self.image.symbols.iter().filter(|symbol| symbol.function);
        let Some(named) = functions.clone().find(|symbol| symbol.address == new) else {
            return vec![self.code.range];
        };
        let is_part = |name: &str| {
            let behind = name.strip_prefix(named.name.as_str());
            behind.is_some_and(|behind| behind.is_empty() || behind.starts_with('.'))
        };
        functions
            .filter(|symbol| is_part(&symbol.name))
            .map(|symbol| GvaRange::new(symbol.address, symbol.address.add(symbol.size)))
            .collect()
    }

    /// The code that a task must have left before it can be switched to the new functions.
    #[must_use]
    fn old_code(&self) -> CodeSet {
        let mut codes = CodeSet::new();
        for function in &self.functions {
            for part in function.old_code() {
                codes.add(*part, function.name.clone());
            }
        }
        codes.add(self.stubs, format!("the entry stubs of {}", self.name()));
        codes
    }

    /// The code that a task must have left before it can be switched back to the old functions.
    #[must_use]
    pub fn new_code(&self) -> CodeSet {
        let mut codes = CodeSet::new();
        for function in self.image.symbols.iter().filter(|symbol| symbol.function) {
            let range = GvaRange::new(function.address, function.address.add(function.size));
            codes.add(range, format!("{} of {}", function.name, self.name()));
        }
        for function in &self.functions {
            for part in function.original_again() {
                codes.add(*part, function.name.clone());
            }
        }
        // Whatever else there is: its read-only data is no place for a frame either.
        codes.add(self.code.range, self.name());
        codes
    }

    /// The code that a task must have left before it can be switched in this direction.
    #[must_use]
    pub fn code_to_leave(&self, direction: Direction) -> CodeSet {
        match direction {
            Direction::Apply => self.old_code(),
            Direction::Revert => self.new_code(),
        }
    }

    /// Its stubs.
    #[must_use]
    pub fn stub_code(&self) -> CodeSet {
        let mut codes = CodeSet::new();
        codes.add(self.stubs, format!("the entry stubs of {}", self.name()));
        codes
    }

    /// The code of the patches that it takes the place of: nobody must be in it when they go.
    #[must_use]
    pub fn replaced_code(&self) -> CodeSet {
        let mut codes = CodeSet::new();
        for old in self.replaces.iter().filter(|old| !old.stays) {
            codes.add(old.code.range, old.name.clone());
        }
        codes
    }

    /// Takes what the unwinder knows of it out again.
    pub fn remove_from(&self, unwinder: &mut Unwinder) {
        unwinder.remove_transient(self.stubs);
        if let Some(region) = self.region {
            unwinder.remove_region(region);
        }
    }

    /// What is to be said of it.
    #[must_use]
    pub fn status(&self, transition: Option<&Transition>) -> PatchStatus {
        let past = match transition {
            Some(running) => running.so_far(),
            None => self.past.clone(),
        };
        PatchStatus {
            name: self.name().into(),
            phase: self.phase,
            enabled: matches!(self.phase, PatchPhase::Applying | PatchPhase::Applied),
            transition: transition.is_some(),
            force: self.forced,
            replace: self.image.replace,
            signal: transition.is_some_and(Transition::signals),
            functions: self
                .functions
                .iter()
                .filter(|function| function.new != Target::Original)
                .map(|function| FunctionReport {
                    object: "vmlinux".into(),
                    name: function.name.clone(),
                    sympos: function.sympos,
                    patched: self.phase != PatchPhase::Reverted,
                })
                .collect(),
            tasks: past.tasks,
            transition_ms: past.ms,
            pauses: past.pauses,
        }
    }
}
