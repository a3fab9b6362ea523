//! `__jump_table`: sets each branch on a static key to the key's present state.
//!
//! The guest does not know the patch's sites, so a later change of a key would not reach them. Only
//! keys that can no longer change are accepted: those in the kernel's (or the patch's own)
//! read-only-after-init data, in a guest that is up. All others are refused by name. This module
//! follows `kernel/jump_label.c: jump_label_type` and `arch/x86/kernel/jump_label.c`.

use introspect::{Gva, GvaRange};

use crate::module::error::{LinkError, TargetError};
use crate::module::file::sections::RO_AFTER_INIT;
use crate::module::kernel::TargetKernel;
use crate::module::link::linker::Linker;
use crate::module::link::symbols::Value;
use crate::module::link::table::Table;
use crate::x86::{JMP8, JMP32, NOP1, NOP2, NOP5, NOP5_K8};

const TABLE: &str = "__jump_table";
const MAX_ENTRIES: usize = 200_000;
/// The low bits of `jump_entry.key`: the branch's polarity, and a flag of the kernel's own.
const KEY_BRANCH: u64 = 1;
const KEY_FLAGS: u64 = 3;

pub(in crate::module) fn apply<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
) -> Result<(), LinkError> {
    let Some(table) = linker.table(TABLE) else {
        return Ok(());
    };
    let (len, entry_size) = (table.section.size, linker.layouts.jump_entry.size);
    if entry_size == 0 || !len.is_multiple_of(entry_size) {
        return Err(bad("its size is not a multiple of this kernel's entries"));
    }
    if len == 0 {
        return Ok(());
    }
    let offsets = table.offsets(entry_size, "static branches", MAX_ENTRIES)?;
    if !target.is_up()? {
        return Err(LinkError::Booting);
    }
    for offset in offsets {
        match apply_one(linker, target, table, offset) {
            Err(error @ LinkError::StaticKey { .. }) => linker.refusals.add(error),
            result => result?,
        }
    }
    Ok(())
}

fn apply_one<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
    table: Table<'_>,
    offset: u64,
) -> Result<(), LinkError> {
    let layout = linker.layouts.jump_entry;
    let Some(code) = linker.table_address(table, offset + layout.code)? else {
        return Ok(());
    };
    let placed = |at: Option<Gva>| at.ok_or_else(|| bad("an entry refers to a dropped section"));
    let to = placed(linker.table_address(table, offset + layout.target)?)?;
    let raw = placed(linker.table_address(table, offset + layout.key)?)?;
    let key = Gva(raw.0 & !KEY_FLAGS);
    let enabled = enabled(linker, target, key, code)?;
    let jump = enabled != (raw.0 & KEY_BRANCH != 0);
    write(linker, code, to, jump)
}

/// `static_key_enabled`, for a key that can no longer change.
fn enabled<T: TargetKernel + ?Sized>(
    linker: &Linker<'_>,
    target: &T,
    key: Gva,
    code: Gva,
) -> Result<bool, LinkError> {
    let mut count = [0; 4];
    let at = key.add(linker.layouts.static_key_enabled);
    if is_own_constant(linker, key) {
        let own = linker.rodata.get(at, 4);
        count.copy_from_slice(own.ok_or_else(|| bad("a key extends past its section"))?);
    } else if final_keys(target)?.contains(key) {
        target.read("a static key", at, &mut count)?;
    } else {
        return Err(LinkError::StaticKey {
            function: linker.function_name(code),
            key: key_name(linker, target, key),
        });
    }
    Ok(i32::from_le_bytes(count) > 0)
}

/// Whether the key is the patch's own and its code cannot change it after init, which never runs.
fn is_own_constant(linker: &Linker<'_>, key: Gva) -> bool {
    let sections = &linker.module.file.sections;
    sections.iter().enumerate().any(|(index, section)| {
        section.name == RO_AFTER_INIT
            && linker
                .symbols
                .section_base(index)
                .is_some_and(|base| key >= base && key.since(base) < section.size)
    })
}

/// The addresses of the guest's own keys that can no longer change: `__ro_after_init`.
fn final_keys<T: TargetKernel + ?Sized>(target: &T) -> Result<GvaRange, LinkError> {
    let find = |name| target.symbol(name).ok_or(TargetError::NoSymbol(name));
    Ok(GvaRange::new(
        find("__start_ro_after_init")?,
        find("__end_ro_after_init")?,
    ))
}

fn key_name<T: TargetKernel + ?Sized>(linker: &Linker<'_>, target: &T, key: Gva) -> String {
    if linker.data.contains(key) || linker.rodata.contains(key) {
        let symbols = &linker.module.file.symbols;
        let own = symbols
            .iter()
            .enumerate()
            .find(|(index, s)| s.object && linker.symbols.value(*index) == Value::At(key));
        return own.map_or_else(|| key.to_string(), |(_, s)| s.name.clone());
    }
    target.name_of(key).unwrap_or_else(|| key.to_string())
}

/// Writes a jump to `to`, or a NOP, to the site at `code`, which has two or five bytes, as the
/// assembler chose.
fn write(linker: &mut Linker<'_>, code: Gva, to: Gva, jump: bool) -> Result<(), LinkError> {
    let distance = |len: u64| to.since(code.add(len)).cast_signed();
    let outside = || bad("an entry is not for code of the patch");
    match linker.code.get(code, 2).ok_or_else(outside)? {
        [0x66, NOP1] | [JMP8, _] => {
            let near = i8::try_from(distance(2)).map_err(|_| bad("a short branch is too far"))?;
            let bytes = if jump {
                [JMP8, near.cast_unsigned()]
            } else {
                NOP2
            };
            let site = linker.code.get_mut(code, 2).ok_or_else(outside)?;
            site.copy_from_slice(&bytes);
        }
        _ => {
            let site = linker.code.get_mut(code, 5).ok_or_else(outside)?;
            let nop = site == NOP5 || site == NOP5_K8;
            if !nop && site.first() != Some(&JMP32) {
                return Err(bad("a site is neither a jump nor a NOP"));
            }
            let far = i32::try_from(distance(5)).map_err(|_| bad("a branch is out of reach"))?;
            site.copy_from_slice(&NOP5);
            if jump {
                let [a, b, c, d] = far.to_le_bytes();
                site.copy_from_slice(&[JMP32, a, b, c, d]);
            }
        }
    }
    Ok(())
}

fn bad(why: &str) -> LinkError {
    LinkError::table(TABLE, why)
}
