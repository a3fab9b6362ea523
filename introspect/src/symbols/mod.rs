//! The kernel's symbols, indexed by address and by name.
//!
//! This module knows nothing of how they are stored in the guest ([`kallsyms`] does). Lookups
//! answer as the kernel's own do (`kernel/kallsyms.c: get_symbol_pos`): the first of several names
//! at one address, sizes that reach to the next address that has a name, and `__pfx_` symbols that
//! own the padding before a function.

#[doc(hidden)]
pub mod kallsyms;

use crate::addr::{Gva, GvaRange};

pub use kallsyms::KallsymsError;

/// One symbol of the kernel or of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'s> {
    /// The name as the kernel has it.
    pub name: &'s str,
    /// The address; for a per-CPU variable of a zero-based area, the offset.
    pub gva: Gva,
    /// The letter of its type, as `nm` shows it. It says little, as 7.x shows data as text:
    /// classify symbols by address.
    pub letter: char,
}

/// Why a name does not lead to one symbol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SymbolError {
    /// No symbol has this name.
    #[error("the guest kernel has no symbol {0}")]
    NotFound(String),
    /// Several symbols have the name.
    #[error("the guest kernel has {count} symbols named {name}")]
    Ambiguous {
        /// The name that was searched.
        name: String,
        /// The number of symbols with that name.
        count: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    gva: Gva,
    name: u32,
    len: u16,
    letter: u8,
}

/// Every symbol of the core kernel.
#[derive(Debug)]
pub struct Symbols {
    /// All names, one after the other.
    names: String,
    /// In order of address; equal addresses in the guest's own order.
    entries: Vec<Entry>,
    /// Indices into `entries` in order of name; equal names in order of address.
    by_name: Vec<u32>,
    /// The virtual addresses of the kernel image.
    image: GvaRange,
}

/// Collects symbols in the guest's own order.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    names: String,
    entries: Vec<Entry>,
}

impl Builder {
    /// Reserves memory for `count` symbols whose names have about `bytes` in all.
    pub(crate) fn with_capacity(count: usize, bytes: usize) -> Builder {
        Builder {
            names: String::with_capacity(bytes),
            entries: Vec::with_capacity(count),
        }
    }

    /// Adds a symbol; `None` when its name is longer, or all symbols are more, than the index can
    /// hold.
    pub(crate) fn push(&mut self, gva: Gva, letter: u8, name: &str) -> Option<()> {
        let start = u32::try_from(self.names.len()).ok()?;
        let len = u16::try_from(name.len()).ok()?;
        self.names.push_str(name);
        self.entries.push(Entry {
            gva,
            name: start,
            len,
            letter,
        });
        Some(())
    }

    /// Sorts and indexes the symbols. `image` has the virtual addresses of the kernel image.
    pub(crate) fn build(self, image: GvaRange) -> Option<Symbols> {
        let Builder {
            mut names,
            mut entries,
        } = self;
        names.shrink_to_fit();
        let count = u32::try_from(entries.len()).ok()?;
        entries.sort_by_key(|entry| entry.gva); // stable
        let mut symbols = Symbols {
            names,
            entries,
            by_name: Vec::new(),
            image,
        };
        let mut keyed: Vec<(u64, u32)> = (0..count)
            .map(|index| (prefix(symbols.name_at(index)), index))
            .collect();
        keyed.sort_unstable_by(|a, b| {
            a.0.cmp(&b.0)
                .then_with(|| symbols.name_at(a.1).cmp(symbols.name_at(b.1)))
                .then(a.1.cmp(&b.1))
        });
        symbols.by_name = keyed.into_iter().map(|(_, index)| index).collect();
        Some(symbols)
    }
}

/// The first eight bytes of a name: most comparisons of the sort need no more.
fn prefix(name: &str) -> u64 {
    let mut raw = [0; 8];
    for (to, from) in raw.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    u64::from_be_bytes(raw)
}

impl Symbols {
    /// The number of symbols.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no symbol.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The virtual addresses of the kernel image, `[_text, _end)`.
    #[must_use]
    pub fn image(&self) -> GvaRange {
        self.image
    }

    fn name_of(&self, entry: &Entry) -> &str {
        let start = entry.name as usize;
        self.names
            .get(start..start + usize::from(entry.len))
            .unwrap_or_default()
    }

    fn name_at(&self, index: u32) -> &str {
        self.entries
            .get(index as usize)
            .map_or("", |entry| self.name_of(entry))
    }

    fn symbol(&self, entry: &Entry) -> Symbol<'_> {
        Symbol {
            name: self.name_of(entry),
            gva: entry.gva,
            letter: char::from(entry.letter),
        }
    }

    /// All symbols, in order of address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.entries.iter().map(|entry| self.symbol(entry))
    }

    /// The part of `by_name` whose names `order` finds equal to the wanted one.
    fn named(&self, order: impl Fn(&str) -> std::cmp::Ordering) -> &[u32] {
        let start = self
            .by_name
            .partition_point(|&index| order(self.name_at(index)).is_lt());
        let rest = self.by_name.get(start..).unwrap_or_default();
        let len = rest.partition_point(|&index| order(self.name_at(index)).is_eq());
        rest.get(..len).unwrap_or_default()
    }

    fn resolve<'s>(&'s self, indices: &'s [u32]) -> impl ExactSizeIterator<Item = Symbol<'s>> {
        indices.iter().map(|&index| {
            self.entries.get(index as usize).map_or(
                Symbol {
                    name: "",
                    gva: Gva::NULL,
                    letter: '?',
                },
                |entry| self.symbol(entry),
            )
        })
    }

    /// Every symbol named `name`, in order of address: the n-th is the one that a livepatch selects
    /// with `sympos` n.
    #[must_use]
    pub fn all(&self, name: &str) -> impl ExactSizeIterator<Item = Symbol<'_>> {
        self.resolve(self.named(|other| other.cmp(name)))
    }

    /// Every symbol whose name begins with `prefix`, in order of name.
    #[must_use]
    pub fn prefixed(&self, prefix: &str) -> impl ExactSizeIterator<Item = Symbol<'_>> {
        self.resolve(self.named(|other| {
            if other.starts_with(prefix) {
                std::cmp::Ordering::Equal
            } else {
                other.cmp(prefix)
            }
        }))
    }

    /// The only symbol named `name`.
    ///
    /// # Errors
    /// [`SymbolError`] when there is none, or more than one.
    pub fn unique(&self, name: &str) -> Result<Symbol<'_>, SymbolError> {
        let mut found = self.all(name);
        match (found.next(), found.len()) {
            (Some(symbol), 0) => Ok(symbol),
            (None, _) => Err(SymbolError::NotFound(name.to_owned())),
            (Some(_), more) => Err(SymbolError::Ambiguous {
                name: name.to_owned(),
                count: more + 1,
            }),
        }
    }

    /// The address of the only symbol named `name`.
    ///
    /// # Errors
    /// [`SymbolError`] when there is none, or more than one.
    pub fn address(&self, name: &str) -> Result<Gva, SymbolError> {
        self.unique(name).map(|symbol| symbol.gva)
    }

    /// Whether any symbol is named `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// The symbol that `gva` belongs to, and the offset into it. `None` outside the kernel image.
    #[must_use]
    pub fn at(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        let entry = self.covering(gva)?;
        Some((self.symbol(entry), gva.since(entry.gva)))
    }

    /// The first entry at the highest address not above `gva`.
    fn covering(&self, gva: Gva) -> Option<&Entry> {
        if !self.image.contains(gva) {
            return None;
        }
        let after = self.entries.partition_point(|entry| entry.gva <= gva);
        let last = self.entries.get(after.checked_sub(1)?)?;
        let first = self.entries.partition_point(|entry| entry.gva < last.gva);
        self.entries.get(first)
    }

    /// The addresses of the symbol that `gva` belongs to, by the rule of kallsyms: up to the next
    /// address that has a name.
    #[must_use]
    pub fn extent(&self, gva: Gva) -> Option<GvaRange> {
        let start = self.covering(gva)?.gva;
        let next = self.entries.partition_point(|entry| entry.gva <= gva);
        let end = self
            .entries
            .get(next)
            .map_or(self.image.end, |entry| entry.gva);
        Some(GvaRange::new(start, end))
    }

    /// The size in bytes of the symbol that `gva` belongs to, by the rule of kallsyms.
    #[must_use]
    pub fn size(&self, gva: Gva) -> Option<u64> {
        self.extent(gva).map(|range| range.len())
    }

    /// The addresses of the only symbol named `name`.
    ///
    /// # Errors
    /// [`SymbolError`] when there is none, or more than one, or it lies outside the kernel image.
    pub fn range(&self, name: &str) -> Result<GvaRange, SymbolError> {
        let gva = self.address(name)?;
        self.extent(gva)
            .ok_or_else(|| SymbolError::NotFound(name.to_owned()))
    }

    /// The range between two symbols, for example `_stext` and `_etext`.
    ///
    /// # Errors
    /// [`SymbolError`] when either does not exist, or exists more than once.
    pub fn between(&self, start: &str, end: &str) -> Result<GvaRange, SymbolError> {
        Ok(GvaRange::new(self.address(start)?, self.address(end)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols() -> Symbols {
        let mut builder = Builder::default();
        for (gva, name) in [
            (0x18, "a_per_cpu_offset"),
            (0x1000, "_text"),
            (0x1000, "_stext"),
            (0x1020, "twice"),
            (0x1010, "__pfx_twice"),
            (0x1040, "twice"),
            (0x1060, "once"),
            (0x1080, "once.cold"),
            (0x1090, "once.cold.7"),
            (0x10a0, "oncex"),
        ] {
            builder.push(Gva(gva), b't', name).unwrap();
        }
        builder
            .build(GvaRange::new(Gva(0x1000), Gva(0x10b0)))
            .unwrap()
    }

    #[test]
    fn lookups_by_name_return_one_or_all() {
        let symbols = symbols();
        assert_eq!(symbols.address("once"), Ok(Gva(0x1060)));
        assert_eq!(
            symbols.address("never"),
            Err(SymbolError::NotFound("never".into()))
        );
        assert_eq!(
            symbols.address("twice").unwrap_err().to_string(),
            "the guest kernel has 2 symbols named twice"
        );
        let twice: Vec<_> = symbols.all("twice").map(|symbol| symbol.gva).collect();
        assert_eq!(twice, [Gva(0x1020), Gva(0x1040)]);
        let cold: Vec<_> = symbols.prefixed("once.cold").map(|s| s.name).collect();
        assert_eq!(cold, ["once.cold", "once.cold.7"]);
    }

    #[test]
    fn lookups_by_address_answer_as_the_kernel_does() {
        let symbols = symbols();
        let at = |gva| symbols.at(Gva(gva)).map(|(s, offset)| (s.name, offset));
        assert_eq!(at(0x1004), Some(("_text", 4)));
        assert_eq!(at(0x1015), Some(("__pfx_twice", 5)));
        assert_eq!(at(0x1020), Some(("twice", 0)));
        assert_eq!(at(0x10af), Some(("oncex", 15)));
        assert_eq!(at(0x10b0), None);
        assert_eq!(at(0x18), None);
        assert_eq!(symbols.size(Gva(0x1000)), Some(0x10));
        assert_eq!(symbols.size(Gva(0x10a0)), Some(0x10));
        assert_eq!(
            symbols.range("once"),
            Ok(GvaRange::new(Gva(0x1060), Gva(0x1080)))
        );
    }
}
