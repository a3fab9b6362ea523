//! [`CodeMap`]: all kernel code of a guest, and how each piece of it is unwound.
//!
//! This module knows regions of code, their ORC tables, and the code at which the kernel's own
//! unwind data must not be trusted; it must not know stacks or tasks. Regions are the core kernel,
//! its modules, and code that the caller placed in the guest: the kernel does not know the last, so
//! the caller adds a region for it.

use std::collections::HashSet;

use crate::addr::{Gva, GvaRange};
use crate::unwind::change_log::ChangeLog;
use crate::unwind::orc::{OrcEntry, OrcKind};
use crate::unwind::orc_table::OrcTable;
use crate::unwind::stack::Unreliable;

/// Why a range of core kernel code needs more than its ORC entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeClass {
    /// Stacks of kernel threads and idle tasks end here: an ORC END is correct.
    TaskEntry,
    /// Entry from and exit to user mode: an ORC END is correct for the innermost frame only.
    UserEntry,
    /// While this code runs, its stack, or the task that the stack belongs to, is changing.
    Transient,
    /// A breakpoint or debug handler: if it interrupted kernel code, the stack of that code may not
    /// be what it seems.
    Breakpoint,
    /// A tracer's trampoline: its address replaces return addresses.
    Traced,
}

/// A range of code with unwind data of its own: a module, or code that the caller placed in the
/// guest.
#[derive(Clone, Debug)]
pub struct CodeRegion {
    /// The region's name in error messages.
    pub name: String,
    /// The addresses of the code.
    pub text: GvaRange,
    /// The ORC table of the code.
    pub orc: OrcTable,
    /// Addresses of words in guest memory, and the values that they have as long as the region is
    /// valid. Empty if the guest cannot change or free the code. A module can be unloaded between
    /// two pauses, and another can be loaded at its address.
    pub fingerprint: Vec<(Gva, u64)>,
}

/// Identifies an added code region, so that it can be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u64);

/// How a frame at an address is unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnwindAction {
    /// By this ORC entry.
    Orc(OrcEntry),
    /// By this ORC entry, if that leads to user mode; not if it leads to interrupted kernel code.
    OrcToUser(OrcEntry),
    /// Not at all: this is the outermost frame of a kernel thread or idle task.
    TaskEntry,
    /// Not at all: entry from or exit to user mode, with no kernel function active.
    UserEntry,
}

/// The core kernel's code and unwind data.
#[derive(Clone, Debug)]
pub(crate) struct CoreText {
    /// `_stext.._etext`.
    pub text: GvaRange,
    /// `_sinittext.._einittext`: freed after boot, but still on the stack of the boot CPU's idle
    /// task, which came through it.
    pub init: GvaRange,
    /// The core kernel's ORC table, for both ranges.
    pub orc: OrcTable,
    /// Ranges that need more than their ORC entry, sorted and disjoint.
    pub special: Vec<(GvaRange, CodeClass)>,
}

/// All known kernel code of a guest.
#[derive(Clone, Debug)]
pub(crate) struct CodeMap {
    core: CoreText,
    /// Sorted by start, and disjoint. These have precedence over the core: patches can be in the
    /// padding of its text. Boxed, so that an insertion moves little memory among thousands of
    /// regions.
    regions: Vec<(RegionId, Box<CodeRegion>)>,
    transient: Vec<GvaRange>,
    /// The range around all of `transient`: ordinary frames are outside it and need no further
    /// check.
    transient_bounds: GvaRange,
    next_id: u64,
    changes: ChangeLog,
}

/// The error of adding a code region that overlaps another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("code region {name} overlaps {other}")]
pub struct RegionOverlap {
    /// The name of the region that was to be added.
    pub name: String,
    /// The name of the region that exists.
    pub other: String,
}

impl CodeMap {
    /// A map of the core kernel only.
    #[must_use]
    pub(crate) fn new(mut core: CoreText) -> CodeMap {
        core.special.sort_by_key(|(range, _)| range.start);
        CodeMap {
            core,
            regions: Vec::new(),
            transient: Vec::new(),
            transient_bounds: GvaRange::default(),
            next_id: 0,
            changes: ChangeLog::new(),
        }
    }

    /// A number that differs after every change of the known code.
    #[must_use]
    pub(crate) fn generation(&self) -> u64 {
        self.changes.generation()
    }

    /// The code whose unwind data changed since [`generation`](Self::generation) returned this
    /// number; `None` if that may be any code.
    pub(crate) fn changed_since(&self, generation: u64) -> Option<Vec<GvaRange>> {
        self.changes.since(generation)
    }

    /// Records that any code may have changed.
    pub(crate) fn mark_all_changed(&mut self) {
        self.changes.record_anywhere();
    }

    /// The core kernel's ORC table.
    #[must_use]
    pub(crate) fn core_orc(&self) -> &OrcTable {
        &self.core.orc
    }

    /// Adds a region.
    ///
    /// # Errors
    /// [`RegionOverlap`] when another region covers some of its code. The core kernel's text is no
    /// region: patches go in its padding.
    pub(crate) fn add(&mut self, region: CodeRegion) -> Result<RegionId, RegionOverlap> {
        let at = self
            .regions
            .partition_point(|(_, other)| other.text.start < region.text.start);
        let before = at.checked_sub(1).and_then(|i| self.regions.get(i));
        let overlapping = before
            .filter(|(_, other)| other.text.end > region.text.start)
            .or_else(|| {
                self.regions
                    .get(at)
                    .filter(|(_, other)| other.text.start < region.text.end)
            });
        if let Some((_, other)) = overlapping {
            return Err(RegionOverlap {
                name: region.name,
                other: other.name.clone(),
            });
        }
        let id = RegionId(self.next_id);
        self.next_id += 1;
        self.changes.record(region.text);
        self.regions.insert(at, (id, Box::new(region)));
        Ok(id)
    }

    /// Removes a region, if it exists.
    pub(crate) fn remove(&mut self, id: RegionId) {
        self.remove_where(|other| other == id);
    }

    /// Removes many regions in one pass.
    pub(crate) fn remove_all(&mut self, ids: &HashSet<RegionId>) {
        self.remove_where(|id| ids.contains(&id));
    }

    fn remove_where(&mut self, removed: impl Fn(RegionId) -> bool) {
        let changes = &mut self.changes;
        self.regions.retain(|(id, region)| {
            let removed = removed(*id);
            if removed {
                changes.record(region.text);
            }
            !removed
        });
    }

    /// Makes every stack with code of `range` on it unreliable: trampolines, stubs, code that is
    /// being replaced.
    pub(crate) fn add_transient(&mut self, range: GvaRange) {
        if !range.is_empty() {
            self.transient.push(range);
            self.transient_changed(range);
        }
    }

    /// Undoes one call of [`CodeMap::add_transient`] with the same `range`.
    pub(crate) fn remove_transient(&mut self, range: GvaRange) {
        if let Some(at) = self.transient.iter().position(|added| *added == range) {
            self.transient.swap_remove(at);
            self.transient_changed(range);
        }
    }

    fn transient_changed(&mut self, changed: GvaRange) {
        self.changes.record(changed);
        let start = self.transient.iter().map(|range| range.start).min();
        let end = self.transient.iter().map(|range| range.end).max();
        self.transient_bounds = match (start, end) {
            (Some(start), Some(end)) => GvaRange::new(start, end),
            _ => GvaRange::default(),
        };
    }

    /// The region whose code includes `code`; `None` in the core kernel and outside of kernel code.
    #[must_use]
    pub(crate) fn region(&self, code: Gva) -> Option<(RegionId, &CodeRegion)> {
        let after = self
            .regions
            .partition_point(|(_, region)| region.text.start <= code);
        let (id, region) = self.regions.get(after.checked_sub(1)?)?;
        region.text.contains(code).then_some((*id, region))
    }

    /// How to unwind a frame at `ip`. `exact`: `ip` is a position in code, not a return address.
    ///
    /// Init text, freed after boot, counts as code only if `through_init` is set.
    ///
    /// # Errors
    /// [`Unreliable`] with the reason why the frame cannot be unwound reliably.
    pub(crate) fn action_at(
        &self,
        ip: Gva,
        exact: bool,
        through_init: bool,
    ) -> Result<UnwindAction, Unreliable> {
        let code = if exact { ip } else { ip.sub(1) };
        if self.is_transient(code) {
            return Err(Unreliable::TransientCode(ip));
        }
        if let Some((_, region)) = self.region(code) {
            return match region.orc.lookup(code) {
                // No stack ends in a module or in a patch.
                Some(entry) if entry.kind == OrcKind::End => Err(Unreliable::UnexpectedEnd(ip)),
                Some(entry) => orc_or_undefined(entry, ip).map(UnwindAction::Orc),
                None => Err(Unreliable::NoOrc(ip)),
            };
        }
        self.check_trampoline(ip, exact)?;
        let in_init = through_init && self.core.init.contains(code);
        if !self.core.text.contains(code) && !in_init {
            return Err(Unreliable::NotText(ip));
        }
        let class = self.class_at(code);
        if class == Some(CodeClass::Transient) {
            return Err(Unreliable::TransientCode(ip));
        }
        let entry = self.core.orc.lookup(code).ok_or(Unreliable::NoOrc(ip))?;
        match (entry.kind, class) {
            (OrcKind::End, Some(CodeClass::TaskEntry)) => Ok(UnwindAction::TaskEntry),
            (OrcKind::End, Some(CodeClass::UserEntry)) if exact => Ok(UnwindAction::UserEntry),
            (OrcKind::End, _) => Err(Unreliable::UnexpectedEnd(ip)),
            (_, Some(CodeClass::Breakpoint)) => {
                orc_or_undefined(entry, ip).map(UnwindAction::OrcToUser)
            }
            _ => orc_or_undefined(entry, ip).map(UnwindAction::Orc),
        }
    }

    /// Fails at a tracer's trampoline. A return address that a tracer put there is its first byte;
    /// any other position in it is that of a task that has returned to it.
    fn check_trampoline(&self, ip: Gva, exact: bool) -> Result<(), Unreliable> {
        let code = if exact { ip } else { ip.sub(1) };
        let traced = |at| {
            let found = self.special_at(at);
            found.filter(|(_, class)| *class == CodeClass::Traced)
        };
        match (traced(ip), traced(code)) {
            (Some((range, _)), _) if !exact && range.start == ip => Err(Unreliable::Traced(ip)),
            (None, None) => Ok(()),
            _ => Err(Unreliable::TransientCode(ip)),
        }
    }

    fn is_transient(&self, code: Gva) -> bool {
        self.transient_bounds.contains(code)
            && self.transient.iter().any(|range| range.contains(code))
    }

    fn class_at(&self, code: Gva) -> Option<CodeClass> {
        self.special_at(code).map(|(_, class)| class)
    }

    fn special_at(&self, code: Gva) -> Option<(GvaRange, CodeClass)> {
        let special = &self.core.special;
        let after = special.partition_point(|(range, _)| range.start <= code);
        let found = special.get(after.checked_sub(1)?)?;
        found.0.contains(code).then_some(*found)
    }
}

fn orc_or_undefined(entry: OrcEntry, ip: Gva) -> Result<OrcEntry, Unreliable> {
    match entry.kind {
        OrcKind::Undefined => Err(Unreliable::NoOrc(ip)),
        _ => Ok(entry),
    }
}

#[cfg(test)]
pub(crate) mod tests;
