//! The stack of patches on each function: which function its calls reach now, and which they would
//! reach without the newest patch.
//!
//! As in the kernel (`kernel/livepatch/patch.c: klp_ops.func_stack`), calls of a function go to its
//! newest patch. In that patch's transition, tasks that have not switched get the previous
//! function: that of the next older patch, or the original. A patch that replaces all earlier ones
//! (`klp_patch.replace`) has, for each function that only they patch, an entry that makes calls
//! reach the original again (`core.c: klp_add_object_nops`).
//!
//! This module knows patches and addresses; it must not know guest memory.

use introspect::GvaRange;

use crate::livepatch::func::{PatchedFunction, Target};
use crate::livepatch::patch::Patch;

/// The newest of `patches` that patches the function with this body, and its entry for it.
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

/// The function that calls of `original` reach now, and its code: the previous function of a patch
/// to come.
pub fn previous(patches: &[Patch], original: &GvaRange) -> (Target, Vec<GvaRange>) {
    match newest(patches, original) {
        None => (Target::Original, Vec::new()),
        Some((patch, function)) => match function.new {
            Target::Original => (Target::Original, Vec::new()),
            Target::Patched(code) => (function.new, patch.function_code(code)),
        },
    }
}

/// Every function that `patches` patch, each as its newest patch has it.
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

/// Updates, for each function of patch `at`, whether its calls go to a newer patch.
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
            .map(|(_, other)| other.address_of(other.new));
        function.superseded_by = newest;
    }
}

/// Removes a patch that is gone from the stacks: functions for which it was the previous one get
/// what was previous to it.
pub fn remove(patches: &mut [Patch], gone: &Patch) {
    for function in patches.iter_mut().flat_map(|patch| &mut patch.functions) {
        let below = gone
            .functions
            .iter()
            .find(|old| old.site.at == function.site.at && old.new == function.previous);
        if let Some(old) = below {
            function.previous = old.previous;
            function.previous_code.clone_from(&old.previous_code);
        }
    }
}
