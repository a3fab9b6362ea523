//! The tables that a patch's `struct module` points to and that are made when its code is complete:
//! unwind data and symbols. They are never written.
//!
//! Unwind data are the ORC entries of the patch's code, as
//! `arch/x86/kernel/unwind_orc.c: unwind_module_init` sorts them, and one for its entry stubs. Their
//! addresses are distances from the words that hold them.

use introspect::{Gva, GvaRange};

use crate::error::{PatchError, unexpected};
use crate::module::{Image, OrcRecord};
use crate::registration::kallsyms::Kallsyms;

/// The alignment of the tables, in bytes.
pub const ALIGN: u64 = 8;

/// The tables of one patch, before they have a place.
#[derive(Clone, Debug)]
pub struct Tables {
    orc: Vec<OrcRecord>,
    kallsyms: Kallsyms,
}

/// Tables for a place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTables {
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// `orc_unwind_ip`.
    pub orc_ips: Gva,
    /// `orc_unwind`.
    pub orc: Gva,
    /// The number of ORC entries.
    pub orc_count: u64,
    /// `symtab`.
    pub symtab: Gva,
    /// The number of symbols.
    pub symbols: u64,
    /// `strtab`.
    pub strtab: Gva,
    /// `typetab`.
    pub typetab: Gva,
}

impl Tables {
    /// The tables of the code in `image` and of its entry stubs, which follow it.
    #[must_use]
    pub fn new(image: &Image, stubs: GvaRange) -> Tables {
        let in_text = image.orc.iter().filter(|record| record.ip < stubs.start);
        let mut orc: Vec<OrcRecord> = in_text.copied().collect();
        // A stub is entered by a jump at the entry of a function, and has the stack of one.
        if let Some(entry) = entry_of_a_function(image) {
            orc.push(OrcRecord {
                ip: stubs.start,
                entry,
            });
        }
        Tables {
            orc,
            kallsyms: Kallsyms::new(image, stubs),
        }
    }

    /// How many bytes they have.
    #[must_use]
    pub fn len(&self) -> u64 {
        let Kallsyms {
            symtab,
            strtab,
            typetab,
        } = &self.kallsyms;
        let ips = self.orc.len() * size_of::<i32>();
        let entries = self.orc.len() * size_of::<[u8; 6]>();
        let parts = [ips, entries, symtab.len(), strtab.len(), typetab.len()];
        let padded = parts.map(|len| (len as u64).next_multiple_of(ALIGN));
        padded.iter().sum()
    }

    /// The distances to the addresses of the ORC entries, for the first of them at `at`.
    fn orc_ips(&self, at: Gva) -> Result<Vec<u8>, PatchError> {
        let mut ips = Vec::with_capacity(self.orc.len() * size_of::<i32>());
        for record in &self.orc {
            let word = at.add(ips.len() as u64);
            let distance = i32::try_from(record.ip.since(word).cast_signed());
            let distance = distance
                .map_err(|_| unexpected(format!("{} is too far from {word}", record.ip)))?;
            ips.extend(distance.to_le_bytes());
        }
        Ok(ips)
    }

    /// The tables for the place at `at`.
    ///
    /// # Errors
    /// [`PatchError`] if that is too far from the code.
    pub fn place(&self, at: Gva) -> Result<PlacedTables, PatchError> {
        let entries = self.orc.iter().flat_map(|record| record.entry).collect();
        let Kallsyms {
            symtab,
            strtab,
            typetab,
        } = self.kallsyms.clone();
        let parts: [Vec<u8>; 5] = [self.orc_ips(at)?, entries, symtab, strtab, typetab];
        let mut bytes = Vec::new();
        let starts = parts.map(|part| {
            let start = at.add(bytes.len() as u64);
            bytes.extend(part);
            while !(bytes.len() as u64).is_multiple_of(ALIGN) {
                bytes.push(0);
            }
            start
        });
        let [orc_ips, orc, symtab, strtab, typetab] = starts;
        Ok(PlacedTables {
            bytes,
            orc_ips,
            orc,
            orc_count: self.orc.len() as u64,
            symtab,
            symbols: self.kallsyms.typetab.len() as u64,
            strtab,
            typetab,
        })
    }
}

/// The ORC entry of the patch's code where a function begins, in the kernel's own encoding.
fn entry_of_a_function(image: &Image) -> Option<[u8; 6]> {
    let function = image.functions.first()?;
    let after = image
        .orc
        .partition_point(|record| record.ip <= function.new);
    let record = image.orc.get(after.checked_sub(1)?)?;
    (record.ip == function.new).then_some(record.entry)
}
