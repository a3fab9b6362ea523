//! Which of a module's own addresses its code or data hold, so that the guest may keep them.
//!
//! A timer, a work item, an RCU callback or a table of operations can hold the address of a function
//! of the patch, or of its data, after every task has left the patch's code. The kernel keeps a
//! patch's memory until the module is removed, whose exit function stops these; outpatch runs no
//! exit function. So memory whose address is taken is never freed. An address is *taken* by anything
//! but a direct call or jump, an access to memory, and the module's `klp_patch`. This module knows
//! nothing of a guest.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use object::elf;

use crate::module::file::elf::{ElfFile, Place, Relocation, Section};
use crate::module::file::klp::ModuleOffset;
use crate::module::file::sections::{BUG_TABLE, EX_TABLE, Placement, THIS_MODULE};

/// What is taken of a module, by the name of the first symbol or section of which it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenAddresses {
    /// Of its code.
    pub code: Option<String>,
    /// Of its data, constants included.
    pub data: Option<String>,
}

/// Finds the addresses that are taken. `structures` are the places of the module's `klp_patch`,
/// `klp_object`s and `klp_func`s, with their lengths: outpatch reads these, and nothing in the guest
/// does.
pub(in crate::module) fn find(
    file: &ElfFile,
    placements: &[Placement],
    structures: &[(ModuleOffset, u64)],
) -> TakenAddresses {
    let mut taken = TakenAddresses::default();
    for (index, (section, placement)) in file.sections.iter().zip(placements).enumerate() {
        if *placement == Placement::Dropped || is_read_by_tables(&section.name) {
            continue;
        }
        let mut relocations: Vec<&Relocation> = section.relocations.iter().collect();
        relocations.extend(section.klp_relocations.values().flatten());
        relocations.sort_by_key(|relocation| relocation.offset);
        if *placement == Placement::Text {
            relocations = address_operands(file, section, &relocations);
        } else {
            relocations.retain(|relocation| {
                !structures.iter().any(|(at, len)| {
                    at.section == index && relocation.offset.wrapping_sub(at.offset) < *len
                })
            });
        }
        for relocation in relocations {
            note(file, placements, relocation, &mut taken);
        }
    }
    taken
}

/// Whether what refers from this section, or to it, is known to be over when the patch is no longer
/// registered: the exception table and the bug table. That of `struct module` to the init and exit
/// functions is not even written.
fn is_read_by_tables(section: &str) -> bool {
    [EX_TABLE, BUG_TABLE, THIS_MODULE].contains(&section)
}

/// The relocations of a section of code whose instructions use an address as a value.
fn address_operands<'a>(
    file: &ElfFile,
    section: &Section,
    relocations: &[&'a Relocation],
) -> Vec<&'a Relocation> {
    let mut decoder = Decoder::with_ip(64, file.data(section), 0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    let mut rest = relocations.iter().peekable();
    let mut out = Vec::new();
    while let Some(next) = rest.peek() {
        if !decoder.can_decode() {
            // Past the bytes of the section: nothing is known of these.
            out.extend(rest.copied());
            break;
        }
        decoder.decode_out(&mut insn);
        if next.offset >= insn.next_ip() {
            continue;
        }
        let constants = decoder.get_constant_offsets(&insn);
        while let Some(relocation) = rest.next_if(|r| r.offset < insn.next_ip()) {
            let operand = relocation.offset.wrapping_sub(insn.ip());
            let displacement = u64::try_from(constants.displacement_offset()).unwrap_or(u64::MAX);
            let accesses = constants.has_displacement()
                && operand == displacement
                && insn.mnemonic() != Mnemonic::Lea;
            let leads_there =
                insn.is_call_near() || insn.is_jmp_short_or_near() || insn.is_jcc_short_or_near();
            if !accesses && !leads_there {
                out.push(*relocation);
            }
        }
    }
    out
}

/// Notes that the address that `relocation` refers to is taken, if it is the module's own.
fn note(
    file: &ElfFile,
    placements: &[Placement],
    relocation: &Relocation,
    taken: &mut TakenAddresses,
) {
    let Some(symbol) = file.symbol(relocation.symbol) else {
        return;
    };
    let Place::Section(index) = symbol.place else {
        return;
    };
    // A WARN passes the address of its entry to the kernel, which is done with it when it returns.
    if file.section(index).is_some_and(|s| s.name == BUG_TABLE) {
        return;
    }
    let first = match placements.get(index) {
        Some(Placement::Text) => &mut taken.code,
        Some(Placement::Data | Placement::RoData) => &mut taken.data,
        _ => return,
    };
    if first.is_none() {
        // A relative operand of four bytes is usually the end of its instruction.
        let relative = relocation.kind == elf::R_X86_64_PC32.0;
        let offset = symbol.value.wrapping_add_signed(relocation.addend);
        let offset = offset.wrapping_add(if relative { 4 } else { 0 });
        let function = file.function_at(index, offset);
        let section = || {
            file.section(index)
                .map_or_else(String::new, |s| s.name.clone())
        };
        *first = Some(match (function, symbol.name.as_str()) {
            (Some(function), _) => function.name.clone(),
            (None, "") => section(),
            (None, name) => name.to_owned(),
        });
    }
}
