//! The symbols of one module, copied out of the guest.
//!
//! This module follows `kernel/module/kallsyms.c`: the ELF symbol table that the guest keeps for
//! each module (`struct mod_kallsyms`), the rule for which symbol an address belongs to
//! (`find_kallsyms_symbol`), and how `/proc/kallsyms` shows each symbol (`s_show`).
//!
//! # Locks
//! No lock is needed. The guest's own readers take only RCU's: the table of a module that is not in
//! state `Unformed` is complete, and the pointer to it is replaced in one write when the module's
//! init section is freed.

use std::collections::HashMap;

use crate::addr::{Gva, GvaRange};
use crate::kernel::{ExportsLayout, Kernel, ModuleSymbolsLayout};
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::modules::{Module, ModulesError};
use crate::symbols::Symbol;

/// The most symbols of a module that are read; the largest drivers have about 100,000.
const MAX_SYMBOLS: u64 = 1 << 18;
/// `sizeof(Elf64_Sym)`, in bytes.
const SYMBOL: usize = 24;
/// The largest `KSYM_NAME_LEN` so far, without the NUL.
const MAX_NAME: usize = 511;
/// The most bytes that all names of a module may take.
const MAX_NAMES: usize = 16 << 20;
/// The most exports of a module that are read; some modules have a thousand.
const MAX_EXPORTS: u64 = 1 << 14;
/// No kernel has a larger `sizeof(struct kernel_symbol)`; with offsets it is 12 or less.
const MAX_EXPORT_SIZE: u64 = 64;

/// The symbols of one module.
#[derive(Clone, Debug, Default)]
pub struct ModuleSymbols {
    names: String,
    /// In the order of the guest's table.
    entries: Vec<Entry>,
    /// The entries that the module defines, by index and in order of address; equal addresses in
    /// the order of the table.
    by_address: Vec<u32>,
    text: Vec<GvaRange>,
    /// The number of symbols and exports that were read from the guest.
    cost: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    gva: Gva,
    name: usize,
    len: usize,
    letter: u8,
    defined: bool,
}

impl Module {
    /// Reads the module's own symbols. Empty for a module without a symbol table.
    ///
    /// # Errors
    /// [`ModulesError`] when they cannot be read.
    pub fn symbols(
        &self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<ModuleSymbols, ModulesError> {
        let layout = kernel.layout.module.symbols;
        let Some(layout) = layout.filter(|_| !self.kallsyms.is_null()) else {
            return Ok(ModuleSymbols::default());
        };
        Ok(ModuleSymbols::read(memory, layout, self)?)
    }
}

impl ModuleSymbols {
    fn read(
        memory: &KernelMemory<'_>,
        layout: ModuleSymbolsLayout,
        module: &Module,
    ) -> Result<ModuleSymbols, ReadError> {
        let symtab = memory.pointer(layout.symtab.of(module.kallsyms))?;
        let strtab = memory.pointer(layout.strtab.of(module.kallsyms))?;
        let types = memory.pointer(layout.types.of(module.kallsyms))?;
        let count = memory.field(module.kallsyms, layout.count)?;
        let cap = usize::try_from(MAX_SYMBOLS).unwrap_or(usize::MAX);
        let count = count.min(MAX_SYMBOLS + 1);
        let raw = memory.bytes(symtab, count * SYMBOL as u64, cap * SYMBOL)?;
        let letters = memory.bytes(types, count, cap)?;
        let exported = memory.field(module.addr, layout.exports.count)?;
        let exported = exported.min(MAX_EXPORTS);
        let exports = exports(memory, layout.exports, module.addr, exported)?;
        let mut symbols = ModuleSymbols {
            text: module.text.clone(),
            cost: usize::try_from(count + exported).unwrap_or(usize::MAX),
            ..ModuleSymbols::default()
        };
        for (symbol, letter) in raw.chunks_exact(SYMBOL).zip(letters) {
            let Some(symbol) = ElfSymbol::parse(symbol) else {
                continue;
            };
            let name = memory.cstr(strtab.add(u64::from(symbol.name)), MAX_NAME)?;
            // Symbols without a name are section symbols: the kernel leaves them out as well.
            if name.is_empty() {
                continue;
            }
            if symbols.names.len() + name.len() > MAX_NAMES {
                break;
            }
            let exported = exports.get(&name) == Some(&Gva(symbol.value));
            symbols.entries.push(Entry {
                gva: Gva(symbol.value),
                name: symbols.names.len(),
                len: name.len(),
                letter: match exported {
                    true => letter.to_ascii_uppercase(),
                    false => letter.to_ascii_lowercase(),
                },
                defined: symbol.section != 0,
            });
            symbols.names.push_str(&name);
        }
        symbols.index();
        Ok(symbols)
    }

    fn index(&mut self) {
        let defined = (0u32..).zip(&self.entries);
        let defined = defined.filter(|(_, entry)| entry.defined);
        let mut keyed: Vec<(Gva, u32)> = defined.map(|(at, entry)| (entry.gva, at)).collect();
        keyed.sort_unstable();
        self.by_address = keyed.into_iter().map(|(_, at)| at).collect();
    }

    /// The number of symbols and exports that were read from the guest.
    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    fn symbol(&self, entry: &Entry) -> Symbol<'_> {
        let end = entry.name + entry.len;
        Symbol {
            name: self.names.get(entry.name..end).unwrap_or_default(),
            gva: entry.gva,
            letter: char::from(entry.letter),
        }
    }

    fn addressed(&self) -> impl Iterator<Item = &Entry> {
        let entries = self.by_address.iter();
        entries.filter_map(|&at| self.entries.get(at as usize))
    }

    /// All symbols that the module defines, in order of address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.addressed().map(|entry| self.symbol(entry))
    }

    /// All symbols as `/proc/kallsyms` lists them, in its order: also those that the module uses
    /// and others define, as long as the guest keeps those (while the module's init function runs,
    /// and in a livepatch module). The letter is a capital if the module exports the symbol.
    pub fn listed(&self) -> impl ExactSizeIterator<Item = Symbol<'_>> {
        self.entries.iter().map(|entry| self.symbol(entry))
    }

    /// Every symbol named `name` that the module defines, in order of address.
    pub fn all(&self, name: &str) -> impl Iterator<Item = Symbol<'_>> {
        self.iter().filter(move |symbol| symbol.name == name)
    }

    /// The symbol that an address in the module's code belongs to, and the offset into it: the
    /// highest symbol not above the address in the same range of code, and of several at one
    /// address the first in the table.
    #[must_use]
    pub fn at(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        let text = self.text.iter().find(|text| text.contains(gva))?;
        let address = |&at: &u32| {
            let entry = self.entries.get(at as usize);
            entry.map_or(Gva::NULL, |entry| entry.gva)
        };
        let after = self.by_address.partition_point(|at| address(at) <= gva);
        let last = address(self.by_address.get(after.checked_sub(1)?)?);
        let first = self.by_address.partition_point(|at| address(at) < last);
        let entry = self
            .entries
            .get(*self.by_address.get(first)? as usize)
            .filter(|entry| text.contains(entry.gva))?;
        Some((self.symbol(entry), gva.since(entry.gva)))
    }
}

/// What the module exports to all modules, by name (`kernel/module/main.c: is_exported` searches no
/// other list). A name or value is the distance from the word that holds it.
fn exports(
    memory: &KernelMemory<'_>,
    layout: ExportsLayout,
    module: Gva,
    count: u64,
) -> Result<HashMap<String, Gva>, ReadError> {
    let start = memory.pointer(layout.symbols.of(module))?;
    let size = layout.size.min(MAX_EXPORT_SIZE);
    let mut found = HashMap::new();
    for at in 0..count {
        let symbol = start.add(at * size);
        let relative = |field: Field| {
            let word = field.of(symbol);
            Ok::<_, ReadError>(word.offset(i64::from(memory.i32(word)?)))
        };
        let name = memory.cstr(relative(layout.name)?, MAX_NAME)?;
        found.insert(name, relative(layout.value)?);
    }
    Ok(found)
}

/// The fields of an `Elf64_Sym` that are used.
struct ElfSymbol {
    name: u32,
    section: u16,
    value: u64,
}

impl ElfSymbol {
    fn parse(raw: &[u8]) -> Option<ElfSymbol> {
        Some(ElfSymbol {
            name: u32::from_le_bytes(raw.get(..4)?.try_into().ok()?),
            section: u16::from_le_bytes(raw.get(6..8)?.try_into().ok()?),
            value: u64::from_le_bytes(raw.get(8..16)?.try_into().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols() -> ModuleSymbols {
        let mut symbols = ModuleSymbols {
            text: vec![GvaRange::new(Gva(0x1000), Gva(0x2000))],
            ..ModuleSymbols::default()
        };
        for (gva, name, letter, defined) in [
            (0x1040, "second", b't', true),
            (0x1000, "first", b'T', true),
            (0x1000, "alias", b't', true),
            (0x1010, "elsewhere", b'u', false),
            (0x800, "data", b'd', true),
        ] {
            symbols.entries.push(Entry {
                gva: Gva(gva),
                name: symbols.names.len(),
                len: name.len(),
                letter,
                defined,
            });
            symbols.names.push_str(name);
        }
        symbols.index();
        symbols
    }

    #[test]
    fn a_symbol_that_others_define_is_listed_but_owns_no_address() {
        let symbols = symbols();
        let listed: Vec<_> = symbols.listed().map(|s| (s.letter, s.name)).collect();
        assert_eq!(listed[0], ('t', "second"));
        assert_eq!(listed[3], ('u', "elsewhere"));
        assert_eq!(symbols.iter().count(), 4);
        let at = |gva| symbols.at(Gva(gva)).map(|(s, offset)| (s.name, offset));
        assert_eq!(at(0x1018), Some(("first", 0x18)));
        assert_eq!(at(0x1fff), Some(("second", 0xfbf)));
        assert_eq!(at(0x800), None);
        assert_eq!(symbols.all("elsewhere").count(), 0);
    }
}
