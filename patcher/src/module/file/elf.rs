//! A relocatable ELF file as plain data: sections, symbols, relocations.
//!
//! This module knows ELF and its limits, nothing of kernels. The file may be hostile: every count
//! and every range is checked here, once, so that the rest of [`module`](crate::module) can rely on
//! them.

use std::collections::BTreeMap;
use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, Rela as _, SectionHeader as _, Sym as _};
use object::read::{SectionIndex, SymbolIndex};

use crate::module::error::ModuleError;

/// The most bytes of a file; every module of the kernel is far smaller.
pub(in crate::module) const MAX_FILE: usize = 64 << 20;
/// The most sections; builds with `-ffunction-sections` have far fewer.
const MAX_SECTIONS: usize = 20_000;
/// The most symbols; the largest drivers have about 50,000.
const MAX_SYMBOLS: usize = 200_000;
/// The most bytes of a name: `KSYM_NAME_LEN` and the prefixes of livepatch symbols and sections.
const MAX_NAME: usize = 1024;
/// `include/uapi/linux/elf.h: SHN_LIVEPATCH`.
const SHN_LIVEPATCH: u16 = 0xff20;
/// `include/uapi/linux/elf.h: SHF_RELA_LIVEPATCH`.
const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;

/// Where a symbol is defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) enum Place {
    /// In the kernel, which exports it.
    Undefined,
    /// Nowhere: its value is its address.
    Absolute,
    /// An old-style common symbol, which the kernel's loader refuses.
    Common,
    /// In the kernel, exported or not: it is resolved by livepatch's rules.
    Livepatch,
    /// In the section of this index.
    Section(usize),
}

#[derive(Clone, Debug)]
pub(in crate::module) struct Symbol {
    pub name: String,
    pub value: u64,
    pub size: u64,
    pub place: Place,
    pub weak: bool,
    pub function: bool,
    pub object: bool,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::module) struct Relocation {
    pub offset: u64,
    /// `R_X86_64_*`.
    pub kind: u32,
    /// Index of the symbol; 0 is the null symbol.
    pub symbol: usize,
    pub addend: i64,
}

#[derive(Clone, Debug)]
pub(in crate::module) struct Section {
    pub name: String,
    pub flags: u64,
    pub align: u64,
    pub size: u64,
    /// Whether it holds relocations of another section. The flags do not tell: sections of
    /// livepatch relocations are flagged as allocated.
    pub is_relocations: bool,
    /// Where its bytes are in the file; `None`: it is all zeroes.
    file: Option<Range<usize>>,
    /// Its ordinary relocations, sorted by offset.
    pub relocations: Vec<Relocation>,
    /// Its livepatch relocations (`.klp.rela.OBJECT.SECTION`) by object, sorted by offset.
    pub klp_relocations: BTreeMap<String, Vec<Relocation>>,
}

impl Section {
    #[cfg(test)]
    pub fn zeroed(name: &str, flags: u64, size: u64) -> Section {
        Section {
            name: name.to_owned(),
            flags,
            align: 1,
            size,
            is_relocations: false,
            file: None,
            relocations: Vec::new(),
            klp_relocations: BTreeMap::new(),
        }
    }

    pub fn is_alloc(&self) -> bool {
        self.flags & elf::SHF_ALLOC.0 != 0
    }

    pub fn is_exec(&self) -> bool {
        self.flags & elf::SHF_EXECINSTR.0 != 0
    }

    pub fn is_write(&self) -> bool {
        self.flags & elf::SHF_WRITE.0 != 0
    }

    /// The relocation, ordinary or livepatch, at exactly this offset.
    pub fn relocation_at(&self, offset: u64) -> Option<&Relocation> {
        std::iter::once(&self.relocations)
            .chain(self.klp_relocations.values())
            .flat_map(|list| {
                let first = list.partition_point(|r| r.offset < offset);
                list.get(first..)
                    .unwrap_or_default()
                    .iter()
                    .take_while(move |r| r.offset == offset)
            })
            .find(|r| r.kind != elf::R_X86_64_NONE.0)
    }
}

/// A whole file. `sections` and `symbols` keep the file's numbering; number 0 is the null entry in
/// both.
#[derive(Clone)]
pub(in crate::module) struct ElfFile {
    bytes: Vec<u8>,
    pub sections: Vec<Section>,
    pub symbols: Vec<Symbol>,
}

impl std::fmt::Debug for ElfFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ElfFile")
            .field("bytes", &self.bytes.len())
            .field("sections", &self.sections.len())
            .field("symbols", &self.symbols.len())
            .finish()
    }
}

impl ElfFile {
    pub fn parse(bytes: &[u8]) -> Result<ElfFile, ModuleError> {
        if bytes.len() > MAX_FILE {
            return Err(ModuleError::TooLarge {
                len: bytes.len(),
                max: MAX_FILE,
            });
        }
        let header = check_header(bytes)?;
        let table = header.sections(LE, bytes).map_err(damaged)?;
        limit("sections", table.len(), MAX_SECTIONS)?;
        let names = header
            .section_strings_index(LE, bytes)
            .and_then(|index| table.section(index))
            .map_err(damaged)?;
        let names = names.data(LE, bytes).map_err(damaged)?;
        let mut sections = Vec::with_capacity(table.len());
        for raw in table.iter() {
            sections.push(section(raw, names, bytes)?);
        }
        let (symtab, symbols) = symbols(&table, bytes, sections.len())?;
        let mut file = ElfFile {
            bytes: bytes.to_vec(),
            sections,
            symbols,
        };
        for raw in table.iter() {
            file.read_relocations(raw, names, symtab)?;
        }
        for section in &mut file.sections {
            section.relocations.sort_by_key(|r| r.offset);
            for list in section.klp_relocations.values_mut() {
                list.sort_by_key(|r| r.offset);
            }
        }
        Ok(file)
    }

    /// The bytes of a section in the file; empty for one that is all zeroes.
    pub fn data(&self, section: &Section) -> &[u8] {
        section
            .file
            .clone()
            .and_then(|range| self.bytes.get(range))
            .unwrap_or_default()
    }

    pub fn section(&self, index: usize) -> Option<&Section> {
        self.sections.get(index)
    }

    pub fn find(&self, name: &str) -> Option<(usize, &Section)> {
        self.sections
            .iter()
            .enumerate()
            .find(|(_, section)| section.name == name)
    }

    pub fn symbol(&self, index: usize) -> Option<&Symbol> {
        self.symbols.get(index)
    }

    /// The function that covers this offset in a section.
    pub fn function_at(&self, section: usize, offset: u64) -> Option<&Symbol> {
        self.symbols
            .iter()
            .filter(|s| s.function && s.place == Place::Section(section))
            .find(|s| s.value <= offset && offset - s.value < s.size)
    }

    fn read_relocations(
        &mut self,
        raw: &elf::SectionHeader64<LE>,
        names: &[u8],
        symtab: SectionIndex,
    ) -> Result<(), ModuleError> {
        let bytes = std::mem::take(&mut self.bytes);
        let result = self.read_relocations_from(raw, names, symtab, &bytes);
        self.bytes = bytes;
        result
    }

    fn read_relocations_from(
        &mut self,
        raw: &elf::SectionHeader64<LE>,
        names: &[u8],
        symtab: SectionIndex,
        bytes: &[u8],
    ) -> Result<(), ModuleError> {
        let Some((list, link)) = raw.rela(LE, bytes).map_err(damaged)? else {
            return Ok(());
        };
        let own_name = name_at(names, raw.sh_name(LE))?;
        let symbols = self.symbols.len();
        let target = usize::try_from(raw.sh_info(LE)).unwrap_or(usize::MAX);
        let Some(section) = self.sections.get_mut(target).filter(|_| link == symtab) else {
            return Err(ModuleError::Damaged(format!(
                "section {own_name} relocates a section that does not exist"
            )));
        };
        // Debug information: never loaded.
        if !section.is_alloc() {
            return Ok(());
        }
        let mut out = Vec::with_capacity(list.len());
        for rela in list {
            let symbol = usize::try_from(rela.r_sym(LE, false)).unwrap_or(usize::MAX);
            let offset = rela.r_offset(LE);
            if symbol >= symbols || offset >= section.size.max(1) {
                return Err(ModuleError::Damaged(format!(
                    "{own_name} has a relocation for symbol {symbol} at {offset:#x}, out of range"
                )));
            }
            out.push(Relocation {
                offset,
                kind: rela.r_type(LE, false).0,
                symbol,
                addend: rela.r_addend(LE),
            });
        }
        if raw.sh_flags(LE).0 & SHF_RELA_LIVEPATCH != 0 {
            // kernel/livepatch/core.c: klp_resolve_symbols reads the object from
            // `.klp.rela.OBJECT.SECTION`.
            let object = own_name
                .strip_prefix(".klp.rela.")
                .and_then(|rest| rest.split('.').next())
                .filter(|object| !object.is_empty())
                .ok_or_else(|| {
                    ModuleError::Damaged(format!(
                        "section {own_name} is flagged as livepatch relocations but not named so"
                    ))
                })?;
            section
                .klp_relocations
                .entry(object.to_owned())
                .or_default()
                .extend(out);
        } else {
            section.relocations.extend(out);
        }
        Ok(())
    }
}

fn check_header(bytes: &[u8]) -> Result<&elf::FileHeader64<LE>, ModuleError> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ModuleError::NotElf);
    }
    match (bytes.get(4), bytes.get(5)) {
        (Some(2), Some(1)) => {}
        (None, _) | (_, None) => return Err(ModuleError::Damaged("ELF header cut short".into())),
        _ => return Err(ModuleError::WrongElf("not 64-bit little-endian")),
    }
    let header = elf::FileHeader64::<LE>::parse(bytes).map_err(damaged)?;
    if header.e_machine(LE) != elf::EM_X86_64 {
        return Err(ModuleError::WrongElf("it is for another machine"));
    }
    if header.e_type(LE) != elf::ET_REL {
        return Err(ModuleError::WrongElf(
            "it is a program, library or core file, not a relocatable object",
        ));
    }
    Ok(header)
}

fn section(
    raw: &elf::SectionHeader64<LE>,
    names: &[u8],
    bytes: &[u8],
) -> Result<Section, ModuleError> {
    let name = name_at(names, raw.sh_name(LE))?;
    let file = match raw.file_range(LE) {
        None => None,
        Some((start, len)) => Some(
            start
                .checked_add(len)
                .and_then(|end| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?))
                .filter(|range| range.end <= bytes.len() || raw.sh_type(LE) == elf::SHT_NULL)
                .ok_or_else(|| {
                    ModuleError::Damaged(format!("section {name} extends past the end of the file"))
                })?,
        ),
    };
    Ok(Section {
        align: raw.sh_addralign(LE).max(1),
        flags: raw.sh_flags(LE).0,
        size: raw.sh_size(LE),
        is_relocations: raw.sh_type(LE) == elf::SHT_RELA,
        name,
        file,
        relocations: Vec::new(),
        klp_relocations: BTreeMap::new(),
    })
}

fn symbols(
    table: &object::read::elf::SectionTable<'_, elf::FileHeader64<LE>>,
    bytes: &[u8],
    sections: usize,
) -> Result<(SectionIndex, Vec<Symbol>), ModuleError> {
    let symtab = table.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(damaged)?;
    if symtab.is_empty() {
        return Err(ModuleError::Stripped);
    }
    limit("symbols", symtab.len(), MAX_SYMBOLS)?;
    let strings = table
        .section(symtab.string_section())
        .and_then(|strings| strings.data(LE, bytes))
        .map_err(damaged)?;
    let mut out = Vec::with_capacity(symtab.len());
    for (index, raw) in symtab.iter().enumerate() {
        let name = name_at(strings, raw.st_name(LE))?;
        let shndx = raw.st_shndx(LE);
        let place = if shndx == elf::SHN_UNDEF {
            Place::Undefined
        } else if shndx == elf::SHN_ABS {
            Place::Absolute
        } else if shndx == elf::SHN_COMMON {
            Place::Common
        } else if shndx.0 == SHN_LIVEPATCH {
            Place::Livepatch
        } else {
            match symtab.symbol_section(LE, raw, SymbolIndex(index)) {
                Ok(Some(section)) if section.0 < sections => Place::Section(section.0),
                _ => {
                    return Err(ModuleError::Damaged(format!(
                        "symbol {name} is in a section that does not exist"
                    )));
                }
            }
        };
        out.push(Symbol {
            value: raw.st_value(LE),
            size: raw.st_size(LE),
            place,
            weak: raw.st_bind() == elf::STB_WEAK,
            function: raw.st_type() == elf::STT_FUNC,
            object: raw.st_type() == elf::STT_OBJECT,
            name,
        });
    }
    Ok((symtab.section(), out))
}

/// The string at `offset`, of limited length: names overlap in a hostile table, and each would be
/// scanned to its end.
fn name_at(strings: &[u8], offset: u32) -> Result<String, ModuleError> {
    usize::try_from(offset)
        .ok()
        .and_then(|offset| strings.get(offset..))
        .and_then(|rest| text(rest, MAX_NAME))
        .ok_or_else(|| ModuleError::Damaged(format!("no name at {offset:#x} of a string table")))
}

/// The NUL-terminated UTF-8 string at the start of `bytes`.
pub(in crate::module) fn text(bytes: &[u8], limit: usize) -> Option<String> {
    let bytes = bytes.get(..limit.min(bytes.len()))?;
    let end = bytes.iter().position(|&b| b == 0)?;
    std::str::from_utf8(bytes.get(..end)?)
        .ok()
        .map(str::to_owned)
}

fn damaged(error: object::read::Error) -> ModuleError {
    ModuleError::Damaged(error.to_string())
}

/// Refuses more than `max` of something.
pub(in crate::module) fn limit(
    what: &'static str,
    count: usize,
    max: usize,
) -> Result<(), ModuleError> {
    if count > max {
        return Err(ModuleError::TooMany { what, count, max });
    }
    Ok(())
}
