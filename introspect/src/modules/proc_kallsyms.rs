//! Every symbol of the guest, as its `/proc/kallsyms` lists them: the kernel's, each module's, and those of code that the kernel
//! made at run time.
//!
//! Follows `kernel/kallsyms.c: update_iter_mod`. Behind the modules come ftrace's trampolines (`[__builtin__ftrace]`), BPF programs
//! and trampolines (`[bpf]`, `kernel/bpf/core.c: bpf_get_kallsym`) and the pages of kprobes (`[__builtin__kprobes]`,
//! `kernel/kprobes.c: kprobe_cache_get_kallsym`). One sort is left out: the names that ftrace keeps of a module's init functions
//! that are gone (`ftrace_mod_maps`). They exist only where the module was loaded while functions were traced, name no code that
//! there is, and the kernel's own listing of them shows the first twice and the last never.
//!
//! # Locks
//! None. Each of these lists is one that the guest's own readers walk under RCU alone: an entry is whole before it is linked in,
//! and still leads on after it is taken out. In a pause each is seen as before a change or as after it.

use crate::addr::Gva;
use crate::btf::BtfError;
use crate::kernel::Kernel;
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::memory::list::{ListEntries, ListError};
use crate::modules::{self, ModulesError};
use crate::symbols::{Symbol, SymbolError};

/// What all modules together may have, in bytes here: thousands of them can name one and the same table. Half a million symbols
/// take so much; a guest with every module of its distribution has some 300,000.
const MAX_LISTED: usize = 48 << 20;
/// What they may have in the guest, in symbols: those without a name are read and not listed.
const MAX_READ: usize = 1 << 20;
/// No list of these is longer.
const MAX_ENTRIES: usize = 1 << 16;
/// `KSYM_NAME_LEN`, the largest so far, less the NUL.
const MAX_NAME: usize = 511;

/// One line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KallsymsEntry {
    /// Its address; for a per-CPU variable of a zero-based area, its offset.
    pub gva: Gva,
    /// The type's letter; for a module's symbol a capital where the module exports it.
    pub letter: char,
    /// Its name.
    pub name: String,
    /// The module, or what the kernel puts in its place; `None` for the kernel's own.
    pub module: Option<String>,
}

/// Why the symbols could not be listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListingError {
    /// The modules.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A symbol is missing, or there are several.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// A type is missing.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// A list leads out of memory.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// More symbols than all modules of a guest can have.
    #[error("with module {module}, the modules have more symbols than make sense")]
    TooMuch {
        /// The one that was too much.
        module: String,
    },
    /// A list has no end.
    #[error("the list {list} does not end after {MAX_ENTRIES} entries")]
    Endless {
        /// Its symbol.
        list: &'static str,
    },
}

/// All that comes behind the kernel's own symbols ([`Kernel::symbols`], which never change), in the guest's order.
///
/// n log n in the number of symbols, of which there is a limit. What it can say wrong: see the head of this module.
///
/// # Errors
/// [`ListingError`].
pub fn modules_and_runtime(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
) -> Result<Vec<KallsymsEntry>, ListingError> {
    let mut listed = Vec::new();
    let (mut room, mut unread) = (MAX_LISTED, MAX_READ);
    for module in modules::list(kernel, memory)? {
        let symbols = module.symbols(kernel, memory)?;
        let size = |symbol: Symbol<'_>| size_of::<KallsymsEntry>() + symbol.name.len();
        let size = symbols.listed().map(size).sum();
        (room, unread) = room
            .checked_sub(size)
            .zip(unread.checked_sub(symbols.cost()))
            .ok_or_else(|| ListingError::TooMuch {
                module: module.name.clone(),
            })?;
        listed.extend(symbols.listed().map(|symbol| KallsymsEntry {
            gva: symbol.gva,
            letter: symbol.letter,
            name: symbol.name.to_owned(),
            module: Some(module.name.clone()),
        }));
    }
    let made = RuntimeCode { kernel, memory };
    made.ftrace(&mut listed)?;
    made.bpf(&mut listed)?;
    for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        made.kprobes(cache, &mut listed)?;
    }
    Ok(listed)
}

/// Code that the kernel makes at run time.
struct RuntimeCode<'k, 'm> {
    kernel: &'k Kernel,
    memory: &'k KernelMemory<'m>,
}

impl RuntimeCode<'_, '_> {
    /// The variable, where the kernel has what it belongs to.
    fn variable(&self, name: &str) -> Result<Option<Gva>, SymbolError> {
        match self.kernel.symbols.address(name) {
            Ok(gva) => Ok(Some(gva)),
            Err(SymbolError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The entries of the list at `head`, whose `struct list_head` is `link`. All are found before
    /// the first of them is read.
    fn list(&self, head: Gva, list: &'static str, link: Field) -> Result<Vec<Gva>, ListingError> {
        let next = self.kernel.layout.list_next;
        ListEntries::new(self.memory, next, head, link, MAX_ENTRIES)
            .collect::<Result<_, _>>()
            .map_err(|error| match error {
                ListError::Read(error) => ListingError::Read(error),
                ListError::Endless => ListingError::Endless { list },
            })
    }

    /// `kernel/trace/ftrace.c: ftrace_get_trampoline_kallsym`.
    fn ftrace(&self, listed: &mut Vec<KallsymsEntry>) -> Result<(), ListingError> {
        const LIST: &str = "ftrace_ops_trampoline_list";
        let Some(head) = self.variable(LIST)? else {
            return Ok(());
        };
        let field = |path| self.kernel.btf.field(path);
        let trampoline = field("ftrace_ops.trampoline")?;
        for ops in self.list(head, LIST, field("ftrace_ops.list")?)? {
            let code = self.memory.pointer(trampoline.of(ops))?;
            if !code.is_null() {
                listed.push(made(code, "ftrace_trampoline".into(), "__builtin__ftrace"));
            }
        }
        Ok(())
    }

    fn bpf(&self, listed: &mut Vec<KallsymsEntry>) -> Result<(), ListingError> {
        const LIST: &str = "bpf_kallsyms";
        let Some(head) = self.variable(LIST)? else {
            return Ok(());
        };
        // `include/linux/filter.h: bpf_jit_kallsyms_enabled`.
        let switch =
            |name| Ok::<_, ListingError>(self.memory.u32(self.kernel.symbols.address(name)?)?);
        if switch("bpf_jit_harden")? != 0 || switch("bpf_jit_kallsyms")? != 1 {
            return Ok(());
        }
        let field = |path| self.kernel.btf.field(path);
        let (start, name) = (field("bpf_ksym.start")?, field("bpf_ksym.name")?);
        for symbol in self.list(head, LIST, field("bpf_ksym.lnode")?)? {
            let code = self.memory.pointer(start.of(symbol))?;
            let name = self.memory.cstr(name.of(symbol), MAX_NAME)?;
            listed.push(made(code, name, "bpf"));
        }
        Ok(())
    }

    fn kprobes(
        &self,
        cache: &'static str,
        listed: &mut Vec<KallsymsEntry>,
    ) -> Result<(), ListingError> {
        let Some(slots) = self.variable(cache)? else {
            return Ok(());
        };
        let field = |path| self.kernel.btf.field(path);
        let name = self
            .memory
            .pointer(field("kprobe_insn_cache.sym")?.of(slots))?;
        let head = field("kprobe_insn_cache.pages")?.of(slots);
        let code = field("kprobe_insn_page.insns")?;
        for page in self.list(head, cache, field("kprobe_insn_page.list")?)? {
            let code = self.memory.pointer(code.of(page))?;
            let name = self.memory.cstr(name, MAX_NAME)?;
            listed.push(made(code, name, "__builtin__kprobes"));
        }
        Ok(())
    }
}

/// The kernel calls all of these local text.
fn made(gva: Gva, name: String, owner: &str) -> KallsymsEntry {
    KallsymsEntry {
        gva,
        letter: 't',
        name,
        module: Some(owner.to_owned()),
    }
}
