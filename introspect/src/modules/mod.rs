//! The guest's loaded modules: their names, code, unwind data and symbols.
//!
//! This module follows `kernel/module/main.c` and `kallsyms.c`.
//!
//! # Locks
//! No lock is needed. The list changes under `module_mutex`, but by `list_add_rcu` and
//! `list_del_rcu`: a reader that walks it forwards sees every module once or not at all, at any
//! instruction of a change. A module is in state `Unformed` from before it is linked until it is
//! whole, and again from before it is taken apart; it is left out then. So the mutex, which is held
//! for long around neither, need not be free.

mod proc_kallsyms;
mod symbols;

use crate::addr::{Gva, GvaRange};
use crate::kernel::{Extent, Kernel, ModuleMemoryLayout};
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::memory::list::{ListEntries, ListError};
use crate::symbols::SymbolError;

pub use proc_kallsyms::{KallsymsEntry, ListingError, modules_and_runtime};
pub use symbols::ModuleSymbols;

/// The most modules that are listed: a distribution builds some 4000, and a guest loads some
/// hundreds.
const MAX_MODULES: usize = 8192;
/// The most bytes of code that a module may have.
const MAX_TEXT: u64 = 256 << 20;
/// `MODULE_NAME_LEN`, in bytes.
const MAX_NAME: usize = 56;

/// Why the modules cannot be listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModulesError {
    /// The kernel has no symbol for the list of modules.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The list, or a module on it, leads to memory that cannot be read.
    #[error("cannot read the list of modules: {0}")]
    Read(#[from] ReadError),
    /// The list does not end within this number of modules.
    #[error("the list of modules does not end after {0} modules")]
    Endless(usize),
    /// A module has its code where no code can be.
    #[error("module {name} has {len:#x} bytes of code at {start}, which is not possible")]
    BadText {
        /// The module's name.
        name: String,
        /// The address of its code.
        start: Gva,
        /// The length of its code in bytes.
        len: u64,
    },
}

/// The state of a module (`enum module_state`) that is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleState {
    /// Loaded and initialised.
    Live,
    /// Loaded, while its init function has not returned.
    Coming,
    /// Being removed.
    Going,
}

/// Where a module's ORC unwind data lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModuleOrc {
    /// The address of `orc_unwind_ip`: the addresses that the entries are for.
    pub ips: Gva,
    /// The address of `orc_unwind`: the entries.
    pub entries: Gva,
    /// The number of entries, and of their addresses.
    pub count: u32,
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The address of its `struct module`.
    pub addr: Gva,
    /// The address of its name in that structure.
    pub name_at: Gva,
    /// Its name, as `lsmod` shows it.
    pub name: String,
    /// Its state when it was read.
    pub state: ModuleState,
    /// The ranges of its code, that of its init functions included while it has them.
    pub text: Vec<GvaRange>,
    /// Where its unwind data lie; `None` if it has none.
    pub orc: Option<ModuleOrc>,
    /// The address of its `struct mod_kallsyms`; null if it has none.
    pub(crate) kallsyms: Gva,
}

/// Lists the modules in the guest's own order, the newest first. Linear in their number, which is
/// bounded.
///
/// # Errors
/// [`ModulesError`] when the list cannot be read, or is not credible.
pub fn list(kernel: &Kernel, memory: &KernelMemory<'_>) -> Result<Vec<Module>, ModulesError> {
    let head = kernel.symbols.address("modules")?;
    let link = kernel.layout.module.list;
    let next = kernel.layout.list_next;
    let mut modules = Vec::new();
    for addr in ListEntries::new(memory, next, head, link, MAX_MODULES) {
        let addr = addr.map_err(|error| match error {
            ListError::Read(error) => ModulesError::Read(error),
            ListError::Endless => ModulesError::Endless(MAX_MODULES),
        })?;
        modules.extend(module(kernel, memory, addr)?);
    }
    Ok(modules)
}

/// Reads a module; `None` while it is in state `Unformed`.
fn module(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    addr: Gva,
) -> Result<Option<Module>, ModulesError> {
    let layout = &kernel.layout.module;
    let state = match memory.field(addr, layout.state)? {
        0 => ModuleState::Live,
        1 => ModuleState::Coming,
        2 => ModuleState::Going,
        _ => return Ok(None),
    };
    let name_at = layout.name.of(addr);
    let name = memory.cstr(name_at, MAX_NAME)?;
    let (ModuleMemoryLayout::Layouts { core, init } | ModuleMemoryLayout::Memories { core, init }) =
        layout.memory;
    let mut text = Vec::with_capacity(2);
    for extent in [core, init] {
        text.extend(code(memory, addr, extent, &name)?);
    }
    let orc = match layout.orc {
        None => None,
        Some(orc) => Some(ModuleOrc {
            ips: memory.pointer(orc.ips.of(addr))?,
            entries: memory.pointer(orc.entries.of(addr))?,
            count: memory.u32(orc.count.of(addr))?,
        }),
    };
    let kallsyms = match layout.kallsyms {
        None => Gva::NULL,
        Some(field) => memory.pointer(field.of(addr))?,
    };
    Ok(Some(Module {
        addr,
        name_at,
        name,
        state,
        text,
        orc: orc.filter(|orc| orc.count != 0),
        kallsyms,
    }))
}

/// The code range that an extent describes; `None` for an empty one.
fn code(
    memory: &KernelMemory<'_>,
    addr: Gva,
    extent: Extent,
    name: &str,
) -> Result<Option<GvaRange>, ModulesError> {
    let start = Gva(memory.field(addr, extent.base)?);
    let len = memory.field(addr, extent.size)?;
    if start.is_null() || len == 0 {
        return Ok(None);
    }
    let end = start.add(len);
    if len > MAX_TEXT || end < start {
        return Err(ModulesError::BadText {
            name: name.to_owned(),
            start,
            len,
        });
    }
    Ok(Some(GvaRange::new(start, end)))
}

impl Module {
    /// Whether `gva` is in this module's code.
    #[must_use]
    pub fn contains(&self, gva: Gva) -> bool {
        self.text.iter().any(|text| text.contains(gva))
    }
}
