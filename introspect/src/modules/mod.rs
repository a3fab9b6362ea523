//! The guest's loaded modules: names, where their code is, and their own symbols.
//!
//! Follows `kernel/module/main.c` and `kallsyms.c`.
//!
//! # Locks
//! None. The list changes under `module_mutex`, but by `list_add_rcu` and `list_del_rcu`: whoever walks it forwards sees every module
//! once or not at all, at any instruction of a change. A module is in state `Unformed` from before it is linked until it is whole, and
//! again from before it is taken apart: it is left out then. So the mutex, which is held for long around neither, need not be free.

pub mod proc_kallsyms;
pub mod symbols;

use crate::addr::{Gva, GvaRange};
use crate::kernel::Kernel;
use crate::kernel::layout::{Extent, ModuleMemoryLayout};
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::memory::list::{ListEntries, ListError};
use crate::symbols::SymbolError;

/// No guest has more modules: a distribution builds some 4000, and a guest loads some hundreds.
const MAX_MODULES: usize = 8192;
/// No module has more code.
const MAX_TEXT: u64 = 256 << 20;
/// `MODULE_NAME_LEN`.
const MAX_NAME: usize = 56;

/// Why the modules could not be listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModulesError {
    /// The kernel has no list of modules.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The list leads out of memory.
    #[error("the list of modules: {0}")]
    Read(#[from] ReadError),
    /// The list has no end.
    #[error("the list of modules does not end after {0} modules")]
    Endless(usize),
    /// A module says that its code is where no code can be.
    #[error("module {name} says that its code is {len:#x} bytes at {start}")]
    BadText {
        /// Its name.
        name: String,
        /// Where.
        start: Gva,
        /// How long.
        len: u64,
    },
}

/// `enum module_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleState {
    /// Loaded and initialised.
    Live,
    /// Its init function runs.
    Coming,
    /// Being removed.
    Going,
}

/// A module's unwind data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleOrc {
    /// `orc_unwind_ip`.
    pub ips: Gva,
    /// `orc_unwind`.
    pub entries: Gva,
    /// How many of each.
    pub count: u32,
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its `struct module`.
    pub addr: Gva,
    /// Where in it the name is.
    pub name_at: Gva,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: ModuleState,
    /// Its code: also that of its init function, while it has one.
    pub text: Vec<GvaRange>,
    /// Its unwind data.
    pub orc: Option<ModuleOrc>,
    /// Its `struct mod_kallsyms`.
    pub(crate) kallsyms: Gva,
}

/// Lists the modules, in the guest's own order: the newest first. Linear in their number, of which there is a limit.
///
/// # Errors
/// [`ModulesError`].
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

/// Reads a module; `None` while it is unformed.
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

/// The code that an extent describes; `None` when there is none (any more).
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
    /// Whether `gva` is this module's code.
    #[must_use]
    pub fn contains(&self, gva: Gva) -> bool {
        self.text.iter().any(|text| text.contains(gva))
    }
}
