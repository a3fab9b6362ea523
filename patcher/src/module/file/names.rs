//! [`Names`]: the names of functions and objects of a module by their place, for messages.

use crate::module::file::elf::{ElfFile, Place, Section};

/// The functions and objects of a module, by section and offset.
pub(in crate::module) struct Names<'a> {
    file: &'a ElfFile,
    /// Section, offset, size and name, sorted.
    symbols: Vec<(usize, u64, u64, &'a str)>,
}

impl<'a> Names<'a> {
    /// Of the symbols of `file` that have a type and a name.
    pub fn new(file: &'a ElfFile) -> Names<'a> {
        let named = file.symbols.iter().filter(|s| s.function || s.object);
        let mut symbols: Vec<_> = named
            .filter(|s| !s.name.is_empty())
            .filter_map(|s| match s.place {
                Place::Section(section) => Some((section, s.value, s.size, s.name.as_str())),
                _ => None,
            })
            .collect();
        symbols.sort_unstable();
        Names { file, symbols }
    }

    /// The function or object that covers an offset in a section, and where it starts.
    fn find(&self, section: usize, offset: u64) -> Option<(&'a str, u64)> {
        let after = self
            .symbols
            .partition_point(|(index, start, ..)| (*index, *start) <= (section, offset));
        let before = after.checked_sub(1).and_then(|at| self.symbols.get(at));
        let (index, start, size, name) = before?;
        (*index == section && offset - start < *size).then_some((name, *start))
    }

    /// The name of the function or object there.
    pub fn name(&self, section: usize, offset: u64) -> Option<&'a str> {
        self.find(section, offset).map(|(name, _)| name)
    }

    /// The place as an offset in a function or object, else in the section.
    pub fn place(&self, section: usize, offset: u64) -> String {
        if let Some((name, start)) = self.find(section, offset) {
            return format!("{name}+{:#x}", offset - start);
        }
        let section = self.file.section(section);
        format!(
            "{}+{offset:#x}",
            section.map_or("?", |section| section.name.as_str())
        )
    }

    /// The functions that a table has entries for, or whose code refers to a section; each once, in
    /// order of first mention.
    pub fn users(&self, index: usize, section: &Section) -> Vec<String> {
        let mut users: Vec<String> = Vec::new();
        let mut add = |name: &str| {
            if !users.iter().any(|user| user == name) {
                users.push(name.to_owned());
            }
        };
        for relocation in section.relocations.iter().take(MAX_MENTIONS) {
            let symbol = self.file.symbol(relocation.symbol);
            let Some(Place::Section(target)) = symbol.map(|s| s.place) else {
                continue;
            };
            let value = symbol.map_or(0, |s| s.value);
            let offset = value.wrapping_add_signed(relocation.addend);
            let code = self.file.section(target).is_some_and(Section::is_exec);
            if let Some(name) = self.name(target, offset).filter(|_| code) {
                add(name);
            }
        }
        for (place, symbol) in self.mentions().take(MAX_MENTIONS) {
            if self.file.symbol(symbol).map(|s| s.place) == Some(Place::Section(index))
                && let Some(name) = self.name(place.0, place.1)
            {
                add(name);
            }
        }
        users
    }

    /// A function or object that refers to a symbol.
    pub fn user_of(&self, symbol: usize) -> Option<&'a str> {
        let mut mentions = self.mentions().take(MAX_MENTIONS);
        mentions.find_map(|((section, offset), mentioned)| {
            (mentioned == symbol)
                .then(|| self.name(section, offset))
                .flatten()
        })
    }

    /// Every reference from code: its place, and the symbol that it refers to.
    fn mentions(&self) -> impl Iterator<Item = ((usize, u64), usize)> + use<'a> {
        let sections = self.file.sections.iter().enumerate();
        sections
            .filter(|(_, section)| section.is_exec())
            .flat_map(|(index, section)| {
                let livepatch = section.klp_relocations.values().flatten();
                let all = section.relocations.iter().chain(livepatch);
                all.map(move |relocation| ((index, relocation.offset), relocation.symbol))
            })
    }
}

/// The most references that are searched for a message. A module of 1 MiB of code has some 100,000.
const MAX_MENTIONS: usize = 200_000;
