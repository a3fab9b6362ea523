//! `__bug_table`: where WARN and BUG are in the patch, with their files and lines.
//!
//! The guest searches the table from its first entry to its last (`lib/bug.c: module_find_bug`), and
//! newer kernels' code refers to single entries, so each stays where it is. One for code that is not
//! placed in the guest gets its own address instead, at which no instruction is. The table is
//! writable: the guest notes in it which warnings it has given.

use introspect::Gva;

use crate::module::error::LinkError;
use crate::module::file::sections::BUG_TABLE;
use crate::module::link::image::ImageTable;
use crate::module::link::linker::Linker;
use crate::module::link::table::Table;

/// The most entries; the largest drivers have some hundreds.
const MAX_ENTRIES: usize = 100_000;

/// Writes the addresses in the table.
pub(in crate::module) fn apply(linker: &mut Linker<'_>) -> Result<(), LinkError> {
    let (Some(table), Some(start)) = (linker.table(BUG_TABLE), linker.address_of(BUG_TABLE)) else {
        return Ok(());
    };
    let Some(layout) = linker.layouts.bug else {
        return Err(bad(
            "this kernel has none, or one of a form that is not known",
        ));
    };
    if layout.size == 0 || !table.section.size.is_multiple_of(layout.size) {
        return Err(bad("its size is not a multiple of this kernel's entries"));
    }
    let mut count = 0;
    for offset in table.offsets(layout.size, "bug table entries", MAX_ENTRIES)? {
        let entry = start.add(offset);
        let bug = linker.table_address(table, offset + layout.bug_addr_disp)?;
        if bug.is_some_and(|bug| !linker.code.contains(bug)) {
            return Err(bad("an entry is not for code of the patch"));
        }
        let field = entry.add(layout.bug_addr_disp);
        write(linker, field, bug.unwrap_or(field))?;
        for text in [layout.file_disp, layout.format_disp].into_iter().flatten() {
            let text_at = text_address(linker, table, offset + text)?;
            if let Some(address) = text_at {
                write(linker, entry.add(text), address)?;
            }
        }
        count += 1;
    }
    linker.bugs = ImageTable { at: start, count };
    Ok(())
}

/// The address of a text that the field at `offset` refers to, if it has one: a warning need not
/// have a format, and that of one in a dropped section is never read.
fn text_address(
    linker: &Linker<'_>,
    table: Table<'_>,
    offset: u64,
) -> Result<Option<Gva>, LinkError> {
    match table.section.relocation_at(offset) {
        Some(_) => linker.table_address(table, offset),
        None => Ok(None),
    }
}

/// Writes the distance from `field` to `address`.
fn write(linker: &mut Linker<'_>, field: Gva, address: Gva) -> Result<(), LinkError> {
    let distance = i32::try_from(address.since(field).cast_signed());
    let distance = distance.map_err(|_| bad("an address is out of reach"))?;
    let place = linker.data.get_mut(field, size_of_val(&distance));
    let place = place.ok_or_else(|| bad("an entry extends past the table"))?;
    place.copy_from_slice(&distance.to_le_bytes());
    Ok(())
}

fn bad(why: &str) -> LinkError {
    LinkError::table(BUG_TABLE, why)
}
