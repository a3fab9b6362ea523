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
