//! The list `module_bug_list`, in which the kernel finds the WARN or BUG at an address
//! (`lib/bug.c: module_find_bug`).
//!
//! Readers walk it under RCU from its head to its end; writers hold `module_mutex`. A module that is
//! taken out keeps its own links, as a reader may stand on it. This module plans; it writes nothing
//! itself.

use std::collections::HashMap;

use introspect::{Gva, KernelMemory};

use crate::error::{StepError, unexpected};
use crate::memory::PatchMemory;
use crate::memory::write_batch::WriteBatch;
use crate::registration::layout::ListLayout;

/// The most modules on the list: more than a guest loads.
const MAX_MODULES: usize = 8192;

/// Plans the list without the links at `remove`, and with those at `add` before all others
/// (`list_add_rcu`, `list_del_rcu`).
///
/// # Errors
/// [`StepError::Failed`] when the list is not what the kernel's is, or lacks a link in `remove`.
pub fn plan(
    memory: &KernelMemory<'_>,
    layout: &ListLayout,
    patch_memory: &PatchMemory,
    (add, remove): (&[Gva], &[Gva]),
    writes: &mut WriteBatch,
) -> Result<(), StepError> {
    let old = read(memory, layout)?;
    if let Some(gone) = remove.iter().find(|link| !old.contains(link)) {
        return Err(broken(format!("lacks the link at {gone}")));
    }
    let kept = old.iter().filter(|link| !remove.contains(link));
    let new: Vec<Gva> = add.iter().chain(kept).copied().collect();
    let before = neighbours(layout.head, &old);
    for (link, (prev, next)) in neighbours(layout.head, &new) {
        let was = before.get(&link);
        if was.is_none_or(|(_, old_next)| *old_next != next) {
            let at = layout.next.of(link);
            patch_memory.plan_anywhere(memory, at, &next.0.to_le_bytes(), writes)?;
        }
        if was.is_none_or(|(old_prev, _)| *old_prev != prev) {
            let at = layout.prev.of(link);
            patch_memory.plan_anywhere(memory, at, &prev.0.to_le_bytes(), writes)?;
        }
    }
    Ok(())
}

/// The previous and the next link of each link of a list, its head included.
fn neighbours(head: Gva, links: &[Gva]) -> HashMap<Gva, (Gva, Gva)> {
    let ring = || std::iter::once(head).chain(links.iter().copied());
    let last = links.last().copied().unwrap_or(head);
    let prev = std::iter::once(last).chain(ring());
    let next = ring().skip(1).chain([head]);
    let each = ring().zip(prev).zip(next);
    each.map(|((link, prev), next)| (link, (prev, next)))
        .collect()
}

/// The links of the list, without its head.
fn read(memory: &KernelMemory<'_>, layout: &ListLayout) -> Result<Vec<Gva>, StepError> {
    let mut links = Vec::new();
    let mut at = layout.head;
    loop {
        let next = memory.pointer(layout.next.of(at))?;
        if memory.pointer(layout.prev.of(next))? != at {
            return Err(broken(format!("is broken after the link at {at}")));
        }
        if next == layout.head {
            return Ok(links);
        }
        if links.len() >= MAX_MODULES {
            return Err(broken(format!("does not end after {MAX_MODULES} modules")));
        }
        links.push(next);
        at = next;
    }
}

fn broken(why: impl std::fmt::Display) -> StepError {
    StepError::Failed(unexpected(format!(
        "the guest's list of modules with WARN and BUG (module_bug_list) {why}"
    )))
}
