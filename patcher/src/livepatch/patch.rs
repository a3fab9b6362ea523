//! One patch in one guest: what it replaces, where it is in memory, and where it is in its life.
//!
//! This is the counterpart of the kernel's `struct klp_patch`.

use introspect::unwind::RegionId;
use introspect::unwind::Unwinder;
use introspect::{Gva, GvaRange};

use crate::guest::code_set::{CodeName, CodeSet};
use crate::livepatch::direction::Direction;
use crate::livepatch::func::{PatchedFunction, Target};
use crate::memory::Allocation;
use crate::module::Image;
use crate::registration::Registration;
use crate::report::patch::{FunctionReport, PatchPhase, PatchStatus};
use crate::report::transition::TransitionSummary;
use crate::transition::Transition;

/// A patch that a newer one replaces (`klp_patch.replace`).
#[derive(Clone, Debug)]
pub struct ReplacedPatch {
    /// The name of the patch.
    pub name: String,
    /// The memory of its code and stubs.
    pub code: Allocation,
    /// What of it the guest's kernel knows.
    pub registration: Registration,
    /// Its instructions, as they were written.
    pub text: Vec<u8>,
    /// Its code is never freed ([`Patch::keeps_code`]).
    pub stays: bool,
}

/// A patch in a guest.
#[derive(Debug)]
pub struct Patch {
    /// The module, linked for its addresses.
    pub image: Image,
    /// The functions that it patches, those included whose calls it only makes reach the original
    /// again.
    pub functions: Vec<PatchedFunction>,
    /// The memory of its code and stubs.
    pub code: Allocation,
    /// The bytes that belong in `code`.
    pub code_bytes: Vec<u8>,
    /// The memory of its constants.
    pub rodata: Allocation,
    /// The memory of its data, its `struct module` included.
    pub data: Allocation,
    /// The bytes of its `struct module`.
    pub module_bytes: Vec<u8>,
    /// The memory of the tables that its `struct module` points to.
    pub tables: Allocation,
    /// The bytes of these tables.
    pub tables_bytes: Vec<u8>,
    /// What of it the guest's kernel knows while its code is in the guest.
    pub registration: Registration,
    /// The memory of the table in which its stubs look tasks up; `None` in a guest that keeps patch
    /// states itself.
    pub table: Option<Allocation>,
    /// The part of `code` that is stubs.
    pub stubs: GvaRange,
    /// The stubs in the guest differ from those in `code_bytes`: they still lead to an older patch
    /// that is gone.
    pub stubs_changed: bool,
    /// The patches that it replaces.
    pub replaces: Vec<ReplacedPatch>,
    /// Its unwind data in the unwinder, if it has any.
    pub region: Option<RegionId>,
    /// Where it is in its life.
    pub phase: PatchPhase,
    /// A transition of it was forced: it is no longer known which tasks are in its code, so that is
    /// never freed.
    pub forced: bool,
    /// Its last completed transition.
    pub last_transition: TransitionSummary,
}

impl Patch {
    /// The name of the livepatch module.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.image.name
    }

    /// The code of its function at `new`, including parts that lie elsewhere (`.cold`).
    #[must_use]
    pub fn function_code(&self, new: Gva) -> Vec<GvaRange> {
        let functions = self.image.symbols.iter().filter(|symbol| symbol.function);
        let Some(named) = functions.clone().find(|symbol| symbol.address == new) else {
            return vec![self.code.range];
        };
        let is_part = |name: &str| {
            let suffix = name.strip_prefix(named.name.as_str());
            suffix.is_some_and(|suffix| suffix.is_empty() || suffix.starts_with('.'))
        };
        functions
            .filter(|symbol| is_part(&symbol.name))
            .map(|symbol| GvaRange::new(symbol.address, symbol.address.add(symbol.size)))
            .collect()
    }

    /// The code that a task must have left before it can switch in this direction: what
    /// `kernel/livepatch/transition.c: klp_check_stack_func` looks for on a stack.
    #[must_use]
    pub fn code_to_leave(&self, direction: Direction) -> CodeSet {
        match direction {
            Direction::Apply => self.previous_code(),
            Direction::Revert => self.new_code(),
        }
    }

    /// The code of the previous functions, and the stubs.
    fn previous_code(&self) -> CodeSet {
        let mut code = CodeSet::new();
        for function in &self.functions {
            for part in function.code_to_leave() {
                code.add(*part, CodeName::Kernel(function.name.clone()));
            }
        }
        code.add(self.stubs, CodeName::Stubs(self.name().into()));
        code
    }

    /// The code of the patch, and that of functions whose calls it makes reach the original again.
    #[must_use]
    pub fn new_code(&self) -> CodeSet {
        let mut code = CodeSet::new();
        for function in self.image.symbols.iter().filter(|symbol| symbol.function) {
            let range = GvaRange::new(function.address, function.address.add(function.size));
            let name = function.name.clone();
            let patch = self.name().into();
            code.add(range, CodeName::Function { name, patch });
        }
        for function in &self.functions {
            for part in function.restored_original() {
                code.add(*part, CodeName::Kernel(function.name.clone()));
            }
        }
        // The rest of its memory: no frame may be in its read-only data either.
        code.add(self.code.range, CodeName::Patch(self.name().into()));
        code
    }

    /// The stubs.
    #[must_use]
    pub fn stub_code(&self) -> CodeSet {
        let mut code = CodeSet::new();
        code.add(self.stubs, CodeName::Stubs(self.name().into()));
        code
    }

    /// The code of the patches that it replaces, as far as that is freed when the transition
    /// completes: no task may be in it then.
    #[must_use]
    pub fn replaced_code(&self) -> CodeSet {
        let mut code = CodeSet::new();
        for old in self.replaces.iter().filter(|old| !old.stays) {
            code.add(old.code.range, CodeName::Patch(old.name.clone()));
        }
        code
    }

    /// Removes its stubs and its unwind data from the unwinder.
    pub fn remove_from(&self, unwinder: &mut Unwinder) {
        unwinder.remove_transient(self.stubs);
        if let Some(region) = self.region {
            unwinder.remove_region(region);
        }
    }

    /// Whether its code is never freed once the guest has run it: tasks may be in it (forced), or
    /// the guest may hold the address of one of its functions (a timer, an RCU callback).
    #[must_use]
    pub fn keeps_code(&self) -> bool {
        self.forced || self.image.taken.code.is_some()
    }

    /// Whether its data is never freed once the guest has run it: its code may use it, or the guest
    /// may hold an address in it.
    #[must_use]
    pub fn keeps_data(&self) -> bool {
        self.keeps_code() || self.image.taken.data.is_some()
    }

    /// The memory that is used for as long as its code is.
    #[must_use]
    pub fn code_memory(&self) -> Vec<Allocation> {
        let all = [self.code, self.tables].into_iter();
        all.chain(self.table).collect()
    }

    /// The memory of its constants and its data.
    #[must_use]
    pub fn data_memory(&self) -> [Allocation; 2] {
        [self.rodata, self.data]
    }

    /// How many bytes stay in the guest when it is reverted.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        let len = |memory: &[Allocation]| memory.iter().map(|it| it.range.len()).sum::<u64>();
        let code = u64::from(self.keeps_code()) * len(&self.code_memory());
        code + u64::from(self.keeps_data()) * len(&self.data_memory())
    }

    /// The report of the patch, with its running transition, if there is one.
    #[must_use]
    pub fn status(&self, transition: Option<&Transition>) -> PatchStatus {
        let summary = match transition {
            Some(running) => running.summary(),
            None => self.last_transition.clone(),
        };
        PatchStatus {
            name: self.name().into(),
            phase: self.phase,
            enabled: matches!(self.phase, PatchPhase::Applying | PatchPhase::Applied),
            transition: transition.is_some(),
            force: self.forced,
            replace: self.image.replace,
            signal: transition.is_some_and(Transition::is_signalling),
            kept_bytes: self.kept_bytes(),
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
            tasks: summary.tasks,
            transition_ms: summary.ms,
            pauses: summary.pauses,
        }
    }
}
