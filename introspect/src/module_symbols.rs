//! The symbols of one module, copied out of the guest.
//!
//! Follows `kernel/module/kallsyms.c`: the ELF symbol table that the guest keeps for each module (`struct mod_kallsyms`), and its
//! rule for which symbol an address belongs to (`find_kallsyms_symbol`).

use crate::addr::{Gva, GvaRange};
use crate::layout::ModuleSymbolsLayout;
use crate::modules::Module;
use crate::reader::{KernelMemory, ReadError};
use crate::symbols::Symbol;

/// Symbols of the largest drivers: about 100,000.
const MAX_SYMBOLS: u64 = 1 << 18;
/// `sizeof(Elf64_Sym)`.
const SYMBOL: usize = 24;
const MAX_NAME: usize = 512;
/// All names of a module together.
const MAX_NAMES: usize = 16 << 20;

/// A module's symbols, in order of address.
#[derive(Clone, Debug, Default)]
pub struct ModuleSymbols {
    names: String,
    entries: Vec<Entry>,
    text: Vec<GvaRange>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    gva: Gva,
    name: usize,
    len: usize,
    info: u8,
}

impl ModuleSymbols {
    pub(crate) fn read(
        memory: &KernelMemory<'_>,
        layout: ModuleSymbolsLayout,
        module: &Module,
    ) -> Result<ModuleSymbols, ReadError> {
        let symtab = memory.pointer(layout.symtab.of(module.kallsyms))?;
        let strtab = memory.pointer(layout.strtab.of(module.kallsyms))?;
        let count = memory.field(module.kallsyms, layout.count)?;
        let cap = usize::try_from(MAX_SYMBOLS).unwrap_or(usize::MAX) * SYMBOL;
        let len = count.min(MAX_SYMBOLS + 1) * SYMBOL as u64;
        let raw = memory.bytes(symtab, len, cap)?;
        let mut symbols = ModuleSymbols {
            text: module.text.clone(),
            ..ModuleSymbols::default()
        };
        for symbol in raw.chunks_exact(SYMBOL) {
            let Some(symbol) = ElfSymbol::parse(symbol) else {
                continue;
            };
            if symbol.name == 0 || symbol.section == 0 {
                continue;
            }
            let name = memory.cstr(strtab.add(u64::from(symbol.name)), MAX_NAME)?;
            if symbols.names.len() + name.len() > MAX_NAMES {
                break;
            }
            symbols.entries.push(Entry {
                gva: Gva(symbol.value),
                name: symbols.names.len(),
                len: name.len(),
                info: symbol.info,
            });
            symbols.names.push_str(&name);
        }
        symbols.entries.sort_by_key(|entry| entry.gva); // stable
        Ok(symbols)
    }

    fn symbol(&self, entry: &Entry) -> Symbol<'_> {
        let end = entry.name + entry.len;
        Symbol {
            name: self.names.get(entry.name..end).unwrap_or_default(),
            gva: entry.gva,
            // Like nm: capital for a global symbol. What sort it is, its address says.
            letter: if entry.info >> 4 == 0 { 't' } else { 'T' },
        }
    }

    /// All symbols, in order of address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.entries.iter().map(|entry| self.symbol(entry))
    }

    /// Every symbol of that name, in order of address.
    pub fn all(&self, name: &str) -> impl Iterator<Item = Symbol<'_>> {
        self.iter().filter(move |symbol| symbol.name == name)
    }

    /// The symbol that an address in the module's code belongs to and the offset into it: the highest not above it in the same
    /// piece of code, and the first in the table of several at one address.
    #[must_use]
    pub fn at(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        let text = self.text.iter().find(|text| text.contains(gva))?;
        let behind = self.entries.partition_point(|entry| entry.gva <= gva);
        let last = self.entries.get(behind.checked_sub(1)?)?;
        let first = self.entries.partition_point(|entry| entry.gva < last.gva);
        let entry = self.entries.get(first)?;
        text.contains(entry.gva)
            .then(|| (self.symbol(entry), gva.since(entry.gva)))
    }
}

/// The fields of an `Elf64_Sym` that matter.
struct ElfSymbol {
    name: u32,
    info: u8,
    section: u16,
    value: u64,
}

impl ElfSymbol {
    fn parse(raw: &[u8]) -> Option<ElfSymbol> {
        Some(ElfSymbol {
            name: u32::from_le_bytes(raw.get(..4)?.try_into().ok()?),
            info: *raw.get(4)?,
            section: u16::from_le_bytes(raw.get(6..8)?.try_into().ok()?),
            value: u64::from_le_bytes(raw.get(8..16)?.try_into().ok()?),
        })
    }
}
