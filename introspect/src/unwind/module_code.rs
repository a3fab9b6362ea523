//! The guest's modules as regions of code.
//!
//! This module knows which modules were loaded at the last refresh, and copies the unwind data of
//! those that were loaded since; it must not know how the kernel's list of modules is laid out
//! ([`crate::modules`]). It follows `arch/x86/kernel/unwind_orc.c: unwind_module_init`.

use std::collections::{HashMap, HashSet};

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::modules::{self, Module, ModuleOrc, ModulesError};
use crate::unwind::code_map::{CodeMap, CodeRegion, RegionId};
use crate::unwind::orc::{ENTRY_SIZE, OrcEncoding};
use crate::unwind::orc_table::OrcTable;

/// The most ORC entries of one module; the largest of a stock kernel have about 40,000.
const MAX_MODULE_ENTRIES: usize = 1 << 20;
/// The most ORC entries of all modules together: they take some 30 MiB here. A hostile guest's
/// modules can all name the same table.
const MAX_ALL_ENTRIES: usize = 2 << 20;

/// The modules that were loaded at the last refresh.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModuleRegions {
    known: HashMap<Gva, KnownModule>,
}

#[derive(Clone, Debug)]
struct KnownModule {
    fingerprint: Vec<(Gva, u64)>,
    regions: Vec<RegionId>,
    /// How many ORC entries the regions have together.
    entries: usize,
}

impl ModuleRegions {
    pub(crate) fn refresh(
        &mut self,
        code: &mut CodeMap,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<(), ModulesError> {
        let present = modules::list(kernel, memory)?;
        let encoding = code.core_orc().encoding();
        let mut removed = std::mem::take(&mut self.known);
        let mut added = Vec::new();
        for module in present {
            let fingerprint = fingerprint(&module, memory);
            match removed.remove(&module.addr) {
                Some(known) if known.fingerprint == fingerprint => {
                    self.known.insert(module.addr, known);
                }
                // Another module at the same address: the regions of the old one are removed with
                // the rest.
                Some(known) => {
                    removed.insert(module.addr, known);
                    added.push((module, fingerprint));
                }
                None => added.push((module, fingerprint)),
            }
        }
        let removed: HashSet<RegionId> = removed
            .into_values()
            .flat_map(|known| known.regions)
            .collect();
        if !removed.is_empty() {
            code.remove_all(&removed);
        }
        let kept: usize = self.known.values().map(|known| known.entries).sum();
        let mut budget = MAX_ALL_ENTRIES.saturating_sub(kept);
        for (module, fingerprint) in added {
            let known = add(code, memory, encoding, &module, fingerprint, budget);
            budget = budget.saturating_sub(known.entries);
            self.known.insert(module.addr, known);
        }
        Ok(())
    }
}

/// Adds the regions of one module. Skips a module whose unwind data cannot be read, exceeds the
/// `budget` of entries, or overlaps another region: stacks with its code are unreliable.
fn add(
    code: &mut CodeMap,
    memory: &KernelMemory<'_>,
    encoding: OrcEncoding,
    module: &Module,
    fingerprint: Vec<(Gva, u64)>,
    budget: usize,
) -> KnownModule {
    let needed = |orc: &&ModuleOrc| orc.count as usize * module.text.len();
    let orc = module.orc.as_ref().filter(|orc| needed(orc) <= budget);
    let mut known = KnownModule {
        fingerprint,
        regions: Vec::new(),
        entries: 0,
    };
    let Some(orc) = orc.and_then(|orc| table(memory, encoding, orc)) else {
        return known;
    };
    for text in &module.text {
        let region = CodeRegion {
            name: module.name.clone(),
            text: *text,
            orc: orc.clone(),
            fingerprint: known.fingerprint.clone(),
        };
        if let Ok(id) = code.add(region) {
            known.regions.push(id);
            known.entries += orc.len();
        }
    }
    known
}

fn table(memory: &KernelMemory<'_>, encoding: OrcEncoding, orc: &ModuleOrc) -> Option<OrcTable> {
    let count = u64::from(orc.count);
    let ips = memory
        .bytes(orc.ips, count * 4, MAX_MODULE_ENTRIES * 4)
        .ok()?;
    let entries = memory
        .bytes(
            orc.entries,
            count * ENTRY_SIZE as u64,
            MAX_MODULE_ENTRIES * ENTRY_SIZE,
        )
        .ok()?;
    OrcTable::from_sections(orc.ips, &ips, &entries, encoding).ok()
}

/// Words that change when the module is unloaded: its links in the list of modules are poisoned and
/// its memory is freed; and the first and last addresses that its table describes.
fn fingerprint(module: &Module, memory: &KernelMemory<'_>) -> Vec<(Gva, u64)> {
    let mut addresses = vec![module.name_at, module.name_at.add(8)];
    if let Some(orc) = &module.orc {
        addresses.push(orc.ips);
        addresses.push(orc.ips.add(u64::from(orc.count) * 4).sub(8));
        addresses.push(orc.entries);
    }
    addresses
        .into_iter()
        .filter_map(|at| Some((at, memory.u64(at).ok()?)))
        .collect()
}
