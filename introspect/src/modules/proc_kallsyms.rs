//! The symbols that the guest's `/proc/kallsyms` lists after the kernel's own: those of modules,
//! and of code that the kernel generates at run time.
//!
//! This module follows `kernel/kallsyms.c: update_iter_mod`. After the modules come ftrace's
//! trampolines (`[__builtin__ftrace]`), BPF programs and trampolines (`[bpf]`, `kernel/bpf/core.c:
//! bpf_get_kallsym`) and the pages of kprobes (`[__builtin__kprobes]`, `kernel/kprobes.c:
//! kprobe_cache_get_kallsym`). One kind is left out: the names that ftrace keeps of a module's
//! freed init functions (`ftrace_mod_maps`). They exist only where the module was loaded while
//! functions were traced, and name no existing code; and the kernel's own listing shows the first
//! of them twice and the last never.
//!
//! # Locks
//! No lock is needed. The guest's own readers walk each of these lists under RCU alone: an entry is
//! whole before it is linked in, and still leads on after it is unlinked. In a pause each list is
//! seen as before a change or as after it.

use crate::addr::Gva;
use crate::btf::BtfError;
use crate::kernel::Kernel;
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::memory::list::{ListEntries, ListError};
use crate::modules::{self, ModulesError};
use crate::symbols::{Symbol, SymbolError};

/// The most bytes that the listed symbols of all modules may take here, as thousands of modules can
/// share one table. That is half a million symbols; a guest with every module of its distribution
/// has some 300,000.
const MAX_LISTED: usize = 48 << 20;
/// The most symbols of all modules that are read. Symbols without a name are read and not listed.
const MAX_READ: usize = 1 << 20;
/// The most entries of each list of generated code.
const MAX_ENTRIES: usize = 1 << 16;
/// The largest `KSYM_NAME_LEN` so far, without the NUL.
const MAX_NAME: usize = 511;

/// One line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KallsymsEntry {
    /// The address; for a per-CPU variable of a zero-based area, the offset.
    pub gva: Gva,
    /// The letter of its type, as `nm` shows it; for a module's symbol a capital if the module
    /// exports it.
    pub letter: char,
    /// The name of the symbol.
    pub name: String,
    /// The module, or what the kernel shows in its place (`bpf`, say); `None` for the kernel's own.
    pub module: Option<String>,
}

/// Why the symbols cannot be listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListingError {
    /// The modules, or their symbols, cannot be read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A symbol is missing, or is ambiguous.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// A type or a member is missing.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// A list leads to memory that cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The modules have more symbols than those of any guest.
    #[error("the modules up to {module} have more symbols than is credible")]
    TooMuch {
        /// The module with which the bound is exceeded.
        module: String,
    },
    /// A list does not end.
    #[error("the list {list} does not end after {MAX_ENTRIES} entries")]
    Endless {
        /// The symbol of the list.
        list: &'static str,
    },
}

/// All symbols that follow the kernel's own ([`Kernel::symbols`], which never change), in the
/// guest's order.
///
/// n log n in the number of symbols, which is bounded. For what is left out, see the head of this
/// file: ftrace's names of freed init functions.
///
/// # Errors
/// [`ListingError`] when a list cannot be read, or is not credible.
pub fn modules_and_runtime(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
) -> Result<Vec<KallsymsEntry>, ListingError> {
    let mut listed = Vec::new();
    let (mut bytes_left, mut reads_left) = (MAX_LISTED, MAX_READ);
    for module in modules::list(kernel, memory)? {
        let symbols = module.symbols(kernel, memory)?;
        let size = |symbol: Symbol<'_>| size_of::<KallsymsEntry>() + symbol.name.len();
        let size = symbols.listed().map(size).sum();
        (bytes_left, reads_left) = bytes_left
            .checked_sub(size)
            .zip(reads_left.checked_sub(symbols.cost()))
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
    let runtime = RuntimeCode { kernel, memory };
    runtime.ftrace(&mut listed)?;
    runtime.bpf(&mut listed)?;
    for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        runtime.kprobes(cache, &mut listed)?;
    }
    Ok(listed)
}

/// Lists code that the kernel generates at run time.
struct RuntimeCode<'k, 'm> {
    kernel: &'k Kernel,
    memory: &'k KernelMemory<'m>,
}

impl RuntimeCode<'_, '_> {
    /// The address of a variable; `None` in a kernel without it.
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
                listed.push(runtime_entry(
                    code,
                    "ftrace_trampoline".into(),
                    "__builtin__ftrace",
                ));
            }
        }
        Ok(())
    }

    /// `kernel/bpf/core.c: bpf_get_kallsym`.
    fn bpf(&self, listed: &mut Vec<KallsymsEntry>) -> Result<(), ListingError> {
        const LIST: &str = "bpf_kallsyms";
        let Some(head) = self.variable(LIST)? else {
            return Ok(());
        };
        // `include/linux/filter.h: bpf_jit_kallsyms_enabled`.
        let sysctl =
            |name| Ok::<_, ListingError>(self.memory.u32(self.kernel.symbols.address(name)?)?);
        if sysctl("bpf_jit_harden")? != 0 || sysctl("bpf_jit_kallsyms")? != 1 {
            return Ok(());
        }
        let field = |path| self.kernel.btf.field(path);
        let (start, name) = (field("bpf_ksym.start")?, field("bpf_ksym.name")?);
        for symbol in self.list(head, LIST, field("bpf_ksym.lnode")?)? {
            let code = self.memory.pointer(start.of(symbol))?;
            let name = self.memory.cstr(name.of(symbol), MAX_NAME)?;
            listed.push(runtime_entry(code, name, "bpf"));
        }
        Ok(())
    }

    /// `kernel/kprobes.c: kprobe_cache_get_kallsym`.
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
            listed.push(runtime_entry(code, name, "__builtin__kprobes"));
        }
        Ok(())
    }
}

/// An entry for generated code, which the kernel always shows as local text.
fn runtime_entry(gva: Gva, name: String, owner: &str) -> KallsymsEntry {
    KallsymsEntry {
        gva,
        letter: 't',
        name,
        module: Some(owner.to_owned()),
    }
}
