//! The [`Linker`]: copies a module's sections to their places and applies the relocations in them
//! (`arch/x86/kernel/module.c: __apply_relocate_add`).

use std::collections::HashSet;

use introspect::{Gva, GvaRange};
use object::elf;

use crate::module::KlpPatch;
use crate::module::error::{LinkError, ModuleError};
use crate::module::file::LivepatchModule;
use crate::module::file::elf::{Place, Relocation};
use crate::module::file::klp::ModuleOffset;
use crate::module::file::layout::Region;
use crate::module::file::own_addresses;
use crate::module::file::sections::{BUG_TABLE, EX_TABLE, Placement, THIS_MODULE};
use crate::module::kernel::Layouts;
use crate::module::link::image::{
    Buffer, Image, ImageSymbol, ImageTable, Import, LinkedFunction, OrcRecord,
};
use crate::module::link::refusals::Refusals;
use crate::module::link::symbols::{Symbols, Value};
use crate::module::link::table::Table;
use crate::x86::{CALL, NOP5};

/// A module while it is linked.
pub(in crate::module) struct Linker<'a> {
    pub module: &'a LivepatchModule,
    pub layouts: &'a Layouts,
    pub patch: &'a KlpPatch,
    pub symbols: Symbols,
    pub code: Buffer,
    pub rodata: Buffer,
    pub data: Buffer,
    /// The sorted exception table.
    pub extable: ImageTable,
    /// The bug table.
    pub bugs: ImageTable,
    /// Why the module is refused, as far as it has been examined.
    pub refusals: Refusals<'a>,
    /// The symbols that are not placed in the guest and that were found to be referred to.
    pub refused: HashSet<usize>,
}

impl<'a> Linker<'a> {
    /// Copies every section that is placed in the guest to its place.
    pub fn load(&mut self) {
        let module = self.module;
        for (section, slot) in module.file.sections.iter().zip(&module.layout.slots) {
            let Some(slot) = slot else { continue };
            let buffer = match slot.region {
                Region::Code => &mut self.code,
                Region::RoData => &mut self.rodata,
                Region::Data => &mut self.data,
            };
            let start = buffer.base.add(slot.offset);
            if let Some(place) = buffer.get_mut(start, size(section.size)) {
                place.fill(0);
                // What the file has of struct module is nothing that the guest could use.
                let bytes = match section.name.as_str() {
                    THIS_MODULE => &[],
                    _ => module.file.data(section),
                };
                for (to, from) in place.iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
        }
    }

    /// Applies all relocations of these sections.
    pub fn relocate(&mut self) -> Result<(), LinkError> {
        let module = self.module;
        for (index, section) in module.file.sections.iter().enumerate() {
            let Some(base) = self.symbols.section_base(index) else {
                continue;
            };
            // Its pointers to the init and exit functions, and the tables that are replaced.
            if [THIS_MODULE, EX_TABLE, BUG_TABLE].contains(&section.name.as_str()) {
                continue;
            }
            for relocation in &section.relocations {
                self.relocate_one(index, base, relocation)?;
            }
            for relocation in section.klp_relocations.values().flatten() {
                self.relocate_one(index, base, relocation)?;
            }
        }
        Ok(())
    }

    fn relocate_one(
        &mut self,
        index: usize,
        base: Gva,
        relocation: &Relocation,
    ) -> Result<(), LinkError> {
        let field = ModuleOffset {
            section: index,
            offset: relocation.offset,
        };
        if relocation.kind == elf::R_X86_64_NONE.0 {
            return Ok(());
        }
        let at = base.add(relocation.offset);
        if self.is_fentry(relocation) {
            return self.replace_fentry(field, at);
        }
        let value = match self.symbols.value(relocation.symbol) {
            Value::At(address) => address.offset(relocation.addend),
            Value::Refused => return Ok(()),
            Value::Dropped => {
                self.refuse_dropped(field, relocation);
                return Ok(());
            }
        };
        let names = self.refusals.names();
        let wrong = |why: String| LinkError::Relocation {
            at: names.place(field.section, field.offset),
            why,
        };
        let name = || {
            self.module
                .file
                .symbol(relocation.symbol)
                .map_or_else(String::new, |s| s.name.clone())
        };
        let bytes = encode(relocation.kind, value, at).map_err(|e| match e {
            Encode::Unknown => wrong(format!("type {} is not known", relocation.kind)),
            Encode::Overflow => wrong(format!("{} is out of reach", name())),
        })?;
        let place = [&mut self.code, &mut self.rodata, &mut self.data]
            .into_iter()
            .find_map(|buffer| buffer.get_mut(at, bytes.len()))
            .ok_or_else(|| wrong("it extends past its section".into()))?;
        if place.iter().any(|&b| b != 0) {
            return Err(wrong("the place is not empty (relocated twice?)".into()));
        }
        place.copy_from_slice(&bytes);
        Ok(())
    }

    fn is_fentry(&self, relocation: &Relocation) -> bool {
        let symbol = self.module.file.symbol(relocation.symbol);
        symbol.is_some_and(|s| s.name == "__fentry__" && s.place == Place::Undefined)
    }

    /// Replaces `call __fentry__` with the NOP that ftrace would put there. The guest's ftrace does
    /// not know of this site.
    fn replace_fentry(&mut self, field: ModuleOffset, at: Gva) -> Result<(), LinkError> {
        let place = self.code.get_mut(at.sub(1), NOP5.len());
        match place {
            Some(place) if place == [CALL, 0, 0, 0, 0] => {
                place.copy_from_slice(&NOP5);
                Ok(())
            }
            _ => Err(LinkError::Relocation {
                at: self.place(field),
                why: "a use of __fentry__ that is not a call".into(),
            }),
        }
    }

    /// Notes a reference to a part of the module that is not placed in the guest: the first one to
    /// each symbol.
    fn refuse_dropped(&mut self, field: ModuleOffset, relocation: &Relocation) {
        let file = &self.module.file;
        let target = file.symbol(relocation.symbol).map(|s| s.place);
        let in_section = match target {
            Some(Place::Section(index)) => file.section(index).map(|s| s.name.clone()),
            _ => None,
        };
        let in_section = in_section.unwrap_or_default();
        if !self.refusals.wanted() || !self.refused.insert(relocation.symbol) {
            return;
        }
        self.refusals.add(LinkError::Dropped {
            at: self.place(field),
            to: self.module.describe(relocation.symbol),
            section: in_section.into(),
        });
    }

    /// A place in the module, for messages.
    fn place(&self, field: ModuleOffset) -> String {
        self.refusals.names().place(field.section, field.offset)
    }

    /// The table in the section `name`; `None` when the module has none.
    pub fn table(&self, name: &'static str) -> Option<Table<'a>> {
        let module = self.module;
        let (_, section) = module.file.find(name)?;
        Some(Table { name, section })
    }

    /// The address that the field at `offset` of a table refers to: the field holds it, or the
    /// distance from itself to it. `None`: it is in a part of the module that is not placed in the
    /// guest.
    pub fn table_address(&self, table: Table<'_>, offset: u64) -> Result<Option<Gva>, LinkError> {
        let bad = || LinkError::table(table.name, format!("no address at offset {offset:#x}"));
        let relocation = table.section.relocation_at(offset).ok_or_else(bad)?;
        let relative = [elf::R_X86_64_PC32, elf::R_X86_64_PC64, elf::R_X86_64_64];
        if !relative.iter().any(|kind| kind.0 == relocation.kind) {
            return Err(bad());
        }
        Ok(match self.symbols.value(relocation.symbol) {
            Value::At(address) => Some(address.offset(relocation.addend)),
            Value::Dropped | Value::Refused => None,
        })
    }

    /// The patch's function that covers an address in its code, for messages.
    pub fn function_name(&self, at: Gva) -> String {
        let names = self.refusals.names();
        let found = (0..self.module.file.sections.len()).find_map(|index| {
            let base = self.symbols.section_base(index)?;
            names.name(index, at.since(base))
        });
        found.map_or_else(|| at.to_string(), str::to_owned)
    }

    /// The address of the section `name`, if it is placed in the guest.
    pub fn address_of(&self, name: &str) -> Option<Gva> {
        let (index, _) = self.module.file.find(name)?;
        self.symbols.section_base(index)
    }

    /// The linked module, whose code and data are final.
    pub fn finish(self) -> Result<Image, LinkError> {
        let no_module = ModuleError::WrongElf("its struct module is not writable data");
        let module = self.address_of(THIS_MODULE).ok_or(no_module)?;
        let symbols = self.image_symbols();
        let functions = self
            .patch
            .functions
            .iter()
            .map(|f| {
                let base = self.symbols.section_base(f.new.section);
                let new = base.unwrap_or_default().add(f.new.offset);
                LinkedFunction {
                    old_name: f.old_name.clone(),
                    sympos: f.sympos,
                    new,
                    new_size: self.function_size(f.new, new, &symbols),
                }
            })
            .collect();
        Ok(Image {
            name: self.module.info.name.clone(),
            replace: self.patch.replace,
            taken: own_addresses::find(
                &self.module.file,
                &self.module.placements,
                &self.patch.structures,
            ),
            text: self.text_range(),
            functions,
            symbols,
            imports: self.imports(),
            orc: self.orc()?,
            code_base: self.code.base,
            code: self.code.bytes,
            module,
            extable: self.extable,
            bugs: self.bugs,
            rodata_base: self.rodata.base,
            rodata: self.rodata.bytes,
            data_base: self.data.base,
            data: self.data.bytes,
        })
    }

    /// The size of its symbol or, if it has none, the rest of the section.
    fn function_size(&self, at: ModuleOffset, new: Gva, symbols: &[ImageSymbol]) -> u64 {
        let first = symbols.partition_point(|s| s.address < new);
        let named = symbols
            .get(first..)
            .unwrap_or_default()
            .iter()
            .take_while(|s| s.address == new)
            .filter(|s| s.function)
            .map(|s| s.size)
            .max();
        let rest = self
            .module
            .file
            .section(at.section)
            .map_or(1, |s| s.size.saturating_sub(at.offset));
        named
            .filter(|&size| size > 0 && size <= rest)
            .unwrap_or(rest)
    }

    /// The part of the code region that is instructions.
    fn text_range(&self) -> GvaRange {
        let module = self.module;
        let len = (module.layout.slots.iter())
            .zip(&module.placements)
            .zip(&module.file.sections)
            .filter(|((_, placement), _)| **placement == Placement::Text)
            .filter_map(|((slot, _), section)| Some(slot.as_ref()?.offset + section.size))
            .max();
        GvaRange::new(self.code.base, self.code.base.add(len.unwrap_or(0)))
    }

    fn image_symbols(&self) -> Vec<ImageSymbol> {
        let mut out: Vec<ImageSymbol> = self
            .module
            .file
            .symbols
            .iter()
            .enumerate()
            .filter(|(_, s)| (s.function || s.object) && !s.name.is_empty())
            .filter_map(|(index, s)| match (s.place, self.symbols.value(index)) {
                (Place::Section(_), Value::At(address)) => Some(ImageSymbol {
                    name: s.name.clone(),
                    address,
                    size: s.size,
                    function: s.function,
                }),
                _ => None,
            })
            .collect();
        out.sort_by(|a, b| (a.address, &a.name).cmp(&(b.address, &b.name)));
        out
    }

    fn imports(&self) -> Vec<Import> {
        let symbols = self.module.file.symbols.iter().enumerate();
        let mut out: Vec<Import> = symbols
            .filter(|(_, s)| !s.name.is_empty())
            .filter_map(|(index, s)| match (s.place, self.symbols.value(index)) {
                (Place::Undefined | Place::Livepatch, Value::At(address)) => Some(Import {
                    name: s.name.clone(),
                    address,
                }),
                _ => None,
            })
            .collect();
        out.sort_by(|a, b| a.name.cmp(&b.name));
        out
    }

    /// The ORC table, sorted as `arch/x86/kernel/unwind_orc.c: unwind_module_init` does.
    fn orc(&self) -> Result<Vec<OrcRecord>, LinkError> {
        const TABLE: &str = ".orc_unwind";
        let file = &self.module.file;
        let (Some((_, ips)), Some((_, entries))) =
            (file.find(".orc_unwind_ip"), file.find(".orc_unwind"))
        else {
            return Ok(Vec::new());
        };
        let (entries, rest) = file.data(entries).as_chunks::<6>();
        if !rest.is_empty() || (entries.len() as u64).checked_mul(4) != Some(ips.size) {
            return Err(LinkError::table(
                TABLE,
                "its size does not match that of .orc_unwind_ip",
            ));
        }
        let table = Table {
            name: TABLE,
            section: ips,
        };
        let mut out = Vec::with_capacity(entries.len());
        for (entry, offset) in entries.iter().zip((0..).step_by(4)) {
            let ip = self.table_address(table, offset)?;
            if let Some(ip) = ip.filter(|&ip| {
                ip >= self.code.base && ip.since(self.code.base) <= self.code.bytes.len() as u64
            }) {
                out.push(OrcRecord { ip, entry: *entry });
            }
        }
        out.sort_by_key(|record| record.ip);
        Ok(out)
    }
}

/// Why a relocation cannot be encoded.
enum Encode {
    Unknown,
    Overflow,
}

/// The bytes of one relocation, as `arch/x86/kernel/module.c: __write_relocate_add` writes them.
fn encode(kind: u32, value: Gva, at: Gva) -> Result<Vec<u8>, Encode> {
    let absolute = value.0;
    let relative = absolute.wrapping_sub(at.0);
    let narrow = |v: u64| {
        i32::try_from(v.cast_signed())
            .map(|v| v.to_le_bytes().to_vec())
            .map_err(|_| Encode::Overflow)
    };
    match elf::RelocationType(kind) {
        elf::R_X86_64_64 => Ok(absolute.to_le_bytes().to_vec()),
        elf::R_X86_64_32 => u32::try_from(absolute)
            .map(|v| v.to_le_bytes().to_vec())
            .map_err(|_| Encode::Overflow),
        elf::R_X86_64_32S => narrow(absolute),
        elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => narrow(relative),
        elf::R_X86_64_PC64 => Ok(relative.to_le_bytes().to_vec()),
        _ => Err(Encode::Unknown),
    }
}

/// A size that `SectionLayout` has already limited.
pub(in crate::module) fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(0)
}

impl LivepatchModule {
    /// The name of a symbol, or of the section that it stands for; for messages.
    fn describe(&self, symbol: usize) -> String {
        let Some(symbol) = self.file.symbol(symbol) else {
            return String::new();
        };
        match symbol.place {
            Place::Section(index) if symbol.name.is_empty() => self
                .file
                .section(index)
                .map_or_else(String::new, |s| s.name.clone()),
            _ => symbol.name.clone(),
        }
    }
}
