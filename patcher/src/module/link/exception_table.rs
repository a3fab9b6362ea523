//! `__ex_table`: where the kernel continues when an instruction of the patch faults.
//!
//! The guest searches the table by bisection, so it is sorted here, as
//! `kernel/module/main.c: post_relocation` has it sorted (`lib/extable.c: sort_extable`). Its
//! addresses are distances from the words that hold them, so that they are computed for the entry's
//! final place. Entries for code that is not placed in the guest are left out.

use introspect::Gva;

use crate::module::error::LinkError;
use crate::module::file::sections::EX_TABLE;
use crate::module::kernel::ExceptionLayout;
use crate::module::link::image::ImageTable;
use crate::module::link::linker::Linker;
use crate::module::link::table::Table;

/// The most entries; the largest drivers have some hundreds.
const MAX_ENTRIES: usize = 100_000;

/// An entry whose addresses are known.
struct Entry {
    insn: Gva,
    /// The offset of each address in the entry, and the address.
    addresses: Vec<(u64, Gva)>,
    /// The entry as the file has it: what is no address stays.
    bytes: Vec<u8>,
}

/// Sorts the table and writes it to its place.
pub(in crate::module) fn apply(linker: &mut Linker<'_>) -> Result<(), LinkError> {
    let (Some(table), Some(start)) = (linker.table(EX_TABLE), linker.address_of(EX_TABLE)) else {
        return Ok(());
    };
    let layout = linker.layouts.exception;
    if layout.size == 0 || !table.section.size.is_multiple_of(layout.size) {
        return Err(bad("its size is not a multiple of this kernel's entries"));
    }
    let mut entries = Vec::new();
    for offset in table.offsets(layout.size, "exception table entries", MAX_ENTRIES)? {
        entries.extend(read(linker, table, layout, offset)?);
    }
    entries.sort_by_key(|entry| entry.insn);
    let mut at = start;
    for entry in &entries {
        write(linker, at, entry)?;
        at = at.add(layout.size);
    }
    linker.extable = ImageTable {
        at: start,
        count: u32::try_from(entries.len()).map_err(|_| bad("it has too many entries"))?,
    };
    Ok(())
}

/// The entry at `offset`; `None`: it is for code that is not placed in the guest.
fn read(
    linker: &Linker<'_>,
    table: Table<'_>,
    layout: ExceptionLayout,
    offset: u64,
) -> Result<Option<Entry>, LinkError> {
    let Some(insn) = linker.table_address(table, offset + layout.insn)? else {
        return Ok(None);
    };
    if !linker.code.contains(insn) {
        return Err(bad("an entry is not for code of the patch"));
    }
    let mut addresses = vec![(layout.insn, insn)];
    for field in [Some(layout.fixup), layout.handler].into_iter().flatten() {
        let address = linker.table_address(table, offset + field)?;
        let address = address.ok_or_else(|| bad("an entry refers to a dropped section"))?;
        addresses.push((field, address));
    }
    let bytes = linker.module.file.data(table.section);
    let range = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(layout.size).ok());
    let bytes = range.and_then(|(offset, size)| bytes.get(offset..offset.checked_add(size)?));
    Ok(Some(Entry {
        insn,
        addresses,
        bytes: bytes.ok_or_else(|| bad("it is all zeroes"))?.to_vec(),
    }))
}

/// Writes an entry to its place at `at`.
fn write(linker: &mut Linker<'_>, at: Gva, entry: &Entry) -> Result<(), LinkError> {
    let place = linker.rodata.get_mut(at, entry.bytes.len());
    place.ok_or_else(outside)?.copy_from_slice(&entry.bytes);
    for (offset, address) in &entry.addresses {
        let field = at.add(*offset);
        let distance = i32::try_from(address.since(field).cast_signed());
        let distance = distance.map_err(|_| bad("an address is out of reach"))?;
        let place = linker.rodata.get_mut(field, size_of_val(&distance));
        place
            .ok_or_else(outside)?
            .copy_from_slice(&distance.to_le_bytes());
    }
    Ok(())
}

fn outside() -> LinkError {
    bad("an entry extends past the table")
}

fn bad(why: &str) -> LinkError {
    LinkError::table(EX_TABLE, why)
}
