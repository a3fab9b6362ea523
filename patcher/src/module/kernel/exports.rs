//! The kernel's own tables of exported symbols, searched in guest memory.
//!
//! This module follows `kernel/module/main.c: find_symbol`: arrays of `struct kernel_symbol`,
//! sorted by name. Up to 6.x there is one array for all modules and one for GPL-compatible modules;
//! 7.x has one array, and a byte of flags for each entry.

use introspect::{Btf, BtfError, Gva, KernelMemory, Symbols};

use crate::guest_array;
use crate::module::error::TargetError;
use crate::module::kernel::Export;

/// The most symbols in one table. Kernels export some 15,000.
const MAX_EXPORTS: u64 = 1 << 18;
/// The most bytes of a name, with its NUL (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 513;

/// Size of `struct kernel_symbol` and offsets in it. Its fields are distances from themselves.
#[derive(Debug)]
struct ExportLayout {
    size: u64,
    value: u64,
    name: u64,
    namespace: u64,
}

impl ExportLayout {
    fn read(btf: &Btf) -> Result<ExportLayout, BtfError> {
        let at = |path| btf.field(path).map(|field| field.offset);
        Ok(ExportLayout {
            size: btf.size_of("kernel_symbol")?.max(1),
            value: at("kernel_symbol.value_offset")?,
            name: at("kernel_symbol.name_offset")?,
            namespace: at("kernel_symbol.namespace_offset")?,
        })
    }
}

/// Which modules may use the entries of a table.
#[derive(Clone, Copy, Debug)]
enum Access {
    All,
    GplOnly,
    /// By an array of flags, one byte for each entry: one with any flag is for GPL-compatible
    /// modules.
    Flags(Gva),
}

/// One array, found by the symbols that the linker script puts around it.
#[derive(Debug)]
struct ExportTable {
    start: Gva,
    count: u64,
    access: Access,
    crcs: Option<Gva>,
}

/// All symbols that the kernel exports to modules.
#[derive(Debug)]
pub(in crate::module) struct Exports<'a> {
    memory: &'a KernelMemory<'a>,
    layout: ExportLayout,
    tables: Vec<ExportTable>,
}

impl<'a> Exports<'a> {
    pub fn find(
        symbols: &Symbols,
        btf: &Btf,
        memory: &'a KernelMemory<'a>,
    ) -> Result<Exports<'a>, TargetError> {
        let layout = ExportLayout::read(btf).map_err(TargetError::from)?;
        let address = |name| symbols.address(name).ok();
        let flags = address("__start___kflagstab");
        let mut tables = Vec::new();
        for (start, stop, crcs, crcs_stop, access) in [
            (
                "__start___ksymtab",
                "__stop___ksymtab",
                "__start___kcrctab",
                "__stop___kcrctab",
                flags.map_or(Access::All, Access::Flags),
            ),
            (
                "__start___ksymtab_gpl",
                "__stop___ksymtab_gpl",
                "__start___kcrctab_gpl",
                "__stop___kcrctab_gpl",
                Access::GplOnly,
            ),
        ] {
            let Some((start, stop)) = address(start).zip(address(stop)) else {
                continue;
            };
            let bytes = stop.since(start);
            let count = bytes / layout.size;
            if count > MAX_EXPORTS || !bytes.is_multiple_of(layout.size) {
                return Err(TargetError::Invalid("table of exported symbols"));
            }
            let crcs = match address(crcs).zip(address(crcs_stop)) {
                // Without CONFIG_MODVERSIONS the labels may be there, with nothing between them.
                None => None,
                Some((start, stop)) => match stop.since(start) {
                    0 => None,
                    bytes if bytes == count * 4 => Some(start),
                    _ => return Err(TargetError::Invalid("table of symbol versions")),
                },
            };
            tables.push(ExportTable {
                start,
                count,
                access,
                crcs,
            });
        }
        if tables.is_empty() {
            return Err(TargetError::NoSymbol("__start___ksymtab"));
        }
        Ok(Exports {
            memory,
            layout,
            tables,
        })
    }

    pub fn get(&self, name: &str) -> Result<Option<Export>, TargetError> {
        for table in &self.tables {
            if let Some(index) = self.search(table, name)? {
                return self.export(table, index).map(Some);
            }
        }
        Ok(None)
    }

    fn search(&self, table: &ExportTable, wanted: &str) -> Result<Option<u64>, TargetError> {
        guest_array::binary_search(table.count, |index| {
            let at = table.start.add(index * self.layout.size);
            let name = self.string(self.relative(at.add(self.layout.name))?)?;
            Ok(name.as_str().cmp(wanted))
        })
    }

    fn export(&self, table: &ExportTable, index: u64) -> Result<Export, TargetError> {
        let at = table.start.add(index * self.layout.size);
        let gpl_only = match table.access {
            Access::All => false,
            Access::GplOnly => true,
            Access::Flags(flags) => {
                let at = flags.add(index);
                let flags = self
                    .memory
                    .u8(at)
                    .map_err(|_| unreadable("export flags", at))?;
                flags != 0
            }
        };
        let crc = match table.crcs {
            None => None,
            Some(crcs) => {
                let at = crcs.add(index * 4);
                let crc = self.memory.u32(at);
                Some(crc.map_err(|_| unreadable("symbol version", at))?)
            }
        };
        Ok(Export {
            address: self.relative(at.add(self.layout.value))?,
            gpl_only,
            namespace: self.namespace(at.add(self.layout.namespace))?,
            crc,
        })
    }

    /// A symbol without a namespace has offset zero or, in newer kernels, an empty string.
    fn namespace(&self, field: Gva) -> Result<Option<String>, TargetError> {
        let at = self.relative(field)?;
        if at == field {
            return Ok(None);
        }
        Ok(Some(self.string(at)?).filter(|namespace| !namespace.is_empty()))
    }

    /// The address that a field refers to (`offset_to_ptr`).
    fn relative(&self, field: Gva) -> Result<Gva, TargetError> {
        let distance = self.memory.i32(field);
        let distance = distance.map_err(|_| unreadable("exported symbol", field))?;
        Ok(field.offset(i64::from(distance)))
    }

    fn string(&self, at: Gva) -> Result<String, TargetError> {
        self.memory
            .cstr(at, MAX_NAME)
            .map_err(|_| unreadable("name of an exported symbol", at))
    }
}

fn unreadable(what: &'static str, at: Gva) -> TargetError {
    TargetError::Memory { what, at }
}
