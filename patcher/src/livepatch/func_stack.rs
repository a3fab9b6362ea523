//! The stack of patches on a function: who serves its calls, and who would without the newest.
//!
//! As the kernel has it (`kernel/livepatch/patch.c: klp_ops.func_stack`): the newest patch of a function serves it; in that patch's
//! transition, tasks that have not moved get the one below, down to the original. A patch that replaces all earlier ones
//! (`klp_patch.replace`) has, for each function that only they patch, a function that is the original again
//! (`core.c: klp_add_object_nops`). Knows patches and addresses; nothing of guest memory.

use introspect::GvaRange;

use crate::livepatch::func::PatchedFunction;
use crate::livepatch::func::Target;
use crate::livepatch::patch::Patch;

/// The newest of `patches` that has a function of this body, and its part of it.
pub fn newest<'p>(
    patches: &'p [Patch],
    original: &GvaRange,
) -> Option<(&'p Patch, &'p PatchedFunction)> {
    patches.iter().rev().find_map(|patch| {
        let mut functions = patch.functions.iter();
        let function = functions.find(|function| function.original.contains(original))?;
        Some((patch, function))
    })
}

/// What a new patch needs to know of a function that other patches have: who serves it now, and where that lies.
pub fn previous(patches: &[Patch], original: &GvaRange) -> (Target, Vec<GvaRange>) {
    match newest(patches, original) {
        None => (Target::Original, Vec::new()),
        Some((patch, function)) => match function.new {
            Target::Original => (Target::Original, Vec::new()),
            Target::Patched(code) => (function.new, patch.function_code(code)),
        },
    }
}

/// Every function that `patches` have, by the newest of each.
pub fn all(patches: &[Patch]) -> Vec<&PatchedFunction> {
    let mut all: Vec<&PatchedFunction> = Vec::new();
    let newest_first = patches.iter().rev().flat_map(|patch| &patch.functions);
    for function in newest_first {
        if !all.iter().any(|known| known.site.at == function.site.at) {
            all.push(function);
        }
    }
    all
}

/// Notes at each function of the patch `at` whether a newer one serves it.
pub fn update_superseded(patches: &mut [Patch], at: usize) {
    let (older, newer) = patches.split_at_mut(at.saturating_add(1));
    let Some(patch) = older.last_mut() else {
        return;
    };
    for function in &mut patch.functions {
        let newest = function
            .original
            .first()
            .and_then(|original| newest(newer, original))
            .map(|(_, other)| other.code_of(other.new));
        function.superseded_by = newest;
    }
}

/// Takes a patch that is gone out of the stacks of the others.
pub fn remove(patches: &mut [Patch], gone: &Patch) {
    for function in patches.iter_mut().flat_map(|patch| &mut patch.functions) {
        let was_below = gone
            .functions
            .iter()
            .find(|old| old.site.at == function.site.at && old.new == function.previous);
        if let Some(old) = was_below {
            function.previous = old.previous;
            function.previous_code.clone_from(&old.previous_code);
        }
    }
}
