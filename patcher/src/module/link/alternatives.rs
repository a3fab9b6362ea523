//! `.altinstructions`: replaces the instructions for which this CPU has alternatives.
//!
//! This is necessary, not an optimization only: STAC and CLAC are NOPs in the file, and a kernel
//! that runs with SMAP faults without them. This module follows `arch/x86/kernel/alternative.c:
//! apply_alternatives`, for both of its table layouts.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};
use introspect::Gva;

use crate::module::error::{LinkError, TargetError};
use crate::module::file::elf::limit;
use crate::module::kernel::TargetKernel;
use crate::module::link::linker::Linker;
use crate::module::link::table::Table;
use crate::x86::{CALL, NOP1, NOPS};

const TABLE: &str = ".altinstructions";
const MAX_ENTRIES: usize = 200_000;
/// `ALTINSTR_FLAG_INV`: the flag in `cpuid`, in kernels whose entries have no field for flags.
const NOT_IN_CPUID: u16 = 1 << 15;
/// `ALT_FLAG_NOT`.
const FLAG_NOT: u16 = 1;
/// `ALT_FLAG_DIRECT_CALL`.
const FLAG_DIRECT_CALL: u16 = 2;

/// One `struct alt_instr`.
struct Entry {
    /// The instructions that may be replaced.
    instr: Gva,
    len: usize,
    /// What replaces them.
    replacement: Gva,
    replacement_len: usize,
    feature: u16,
    not: bool,
    direct_call: bool,
}

pub(in crate::module) fn apply<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
) -> Result<(), LinkError> {
    let mut entries = read(linker)?;
    if entries.is_empty() {
        return Ok(());
    }
    // Nested alternatives: several entries for the same instructions pad to the longest of them.
    for i in 1..entries.len() {
        if let Some([a, b]) = entries.get_mut(i - 1..=i)
            && a.instr == b.instr
        {
            b.len = a.len.max(b.len);
        }
    }
    for i in (1..entries.len()).rev() {
        if let Some([a, b]) = entries.get_mut(i - 1..=i)
            && a.instr == b.instr
        {
            a.len = b.len;
        }
    }
    let capabilities = target.capabilities()?;
    for entry in &entries {
        apply_one(linker, target, entry, &capabilities)?;
    }
    Ok(())
}

fn read(linker: &Linker<'_>) -> Result<Vec<Entry>, LinkError> {
    let Some(table) = linker.table(TABLE) else {
        return Ok(Vec::new());
    };
    let data = linker.module.file.data(table.section);
    let stride = usize::try_from(linker.layouts.alt_instr.size).unwrap_or(0);
    if stride == 0 || !data.len().is_multiple_of(stride) {
        return Err(bad("its size is not a multiple of this kernel's entries"));
    }
    limit("alternatives", data.len() / stride, MAX_ENTRIES)?;
    let mut out = Vec::new();
    for (entry, offset) in data.chunks_exact(stride).zip((0u64..).step_by(stride)) {
        out.extend(read_one(linker, table, entry, offset)?);
    }
    Ok(out)
}

/// One entry of the table; `None`: it is for code that is not placed in the guest.
fn read_one(
    linker: &Linker<'_>,
    table: Table<'_>,
    entry: &[u8],
    offset: u64,
) -> Result<Option<Entry>, LinkError> {
    let layout = &linker.layouts.alt_instr;
    let byte = |at: u64| {
        usize::try_from(at)
            .ok()
            .and_then(|at| entry.get(at).copied())
            .ok_or_else(|| bad("an entry is shorter than this kernel's"))
    };
    let half = |at: u64| Ok::<u16, LinkError>(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
    let Some(instr) = linker.table_address(table, offset + layout.instr_offset)? else {
        return Ok(None);
    };
    let len = usize::from(byte(layout.instrlen)?);
    let replacement_len = usize::from(byte(layout.replacementlen)?);
    let cpuid = half(layout.cpuid)?;
    let (feature, flags) = match layout.flags {
        Some(at) => (cpuid, half(at)?),
        None => (cpuid & !NOT_IN_CPUID, u16::from(cpuid & NOT_IN_CPUID != 0)),
    };
    if flags & !(FLAG_NOT | FLAG_DIRECT_CALL) != 0 {
        return Err(bad("an entry has a flag that is not known"));
    }
    let replacement = match replacement_len {
        // Nothing to copy; the field may refer to the end of any section.
        0 => Some(Gva::NULL),
        _ => linker.table_address(table, offset + layout.repl_offset)?,
    };
    let replacement = replacement.ok_or_else(|| bad("a replacement is in a dropped section"))?;
    if replacement_len > len {
        return Err(bad("a replacement is longer than what it replaces"));
    }
    Ok(Some(Entry {
        instr,
        len,
        replacement,
        replacement_len,
        feature,
        not: flags & FLAG_NOT != 0,
        direct_call: flags & FLAG_DIRECT_CALL != 0,
    }))
}

fn apply_one<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
    entry: &Entry,
    capabilities: &[u32],
) -> Result<(), LinkError> {
    let word = capabilities
        .get(usize::from(entry.feature / 32))
        .ok_or_else(|| bad("an entry tests a CPU feature that this kernel does not know"))?;
    let has = word >> (entry.feature % 32) & 1 != 0;
    let original = linker
        .code
        .get(entry.instr, entry.len)
        .ok_or_else(|| bad("an entry is not for code of the patch"))?;
    let mut bytes = if has == entry.not {
        original.to_vec()
    } else {
        let replacement = match entry.replacement_len {
            0 => &[],
            len => linker
                .code
                .get(entry.replacement, len)
                .ok_or_else(|| bad("a replacement is not in the code of the patch"))?,
        };
        if entry.direct_call {
            direct_call(target, entry, original, replacement)?
        } else {
            let mut bytes = replacement.to_vec();
            relocate_code(&mut bytes, entry.replacement, entry.instr)?;
            bytes
        }
    };
    bytes.resize(entry.len, NOP1);
    join_nops(&mut bytes, entry.instr);
    if let Some(site) = linker.code.get_mut(entry.instr, entry.len) {
        site.copy_from_slice(&bytes);
    }
    Ok(())
}

/// Replaces an indirect call through a variable with a direct call, or with nothing when the
/// variable holds `nop_func` (`alt_replace_call`).
fn direct_call<T: TargetKernel + ?Sized>(
    target: &T,
    entry: &Entry,
    original: &[u8],
    replacement: &[u8],
) -> Result<Vec<u8>, LinkError> {
    let &[0xff, 0x15, a, b, c, d] = original else {
        return Err(bad("a direct call does not replace call *x(%rip)"));
    };
    if replacement.len() != 5 || replacement.first() != Some(&CALL) {
        return Err(bad("a direct call is not a call"));
    }
    let displacement = i64::from(i32::from_le_bytes([a, b, c, d]));
    let variable = entry.instr.add(6).offset(displacement);
    let mut pointer = [0; 8];
    target.read("the target of a direct call", variable, &mut pointer)?;
    let callee = Gva(u64::from_le_bytes(pointer));
    if callee.is_null() {
        return Err(TargetError::Invalid("pointer for a direct call").into());
    }
    if target.symbol("nop_func") == Some(callee) {
        return Ok(Vec::new());
    }
    let distance = callee.since(entry.instr.add(5)).cast_signed();
    let distance = i32::try_from(distance).map_err(|_| bad("a direct call is out of reach"))?;
    let mut call = vec![CALL];
    call.extend_from_slice(&distance.to_le_bytes());
    Ok(call)
}

/// Relocates code that was linked for `from` to `to`: adjusts its relative references to addresses
/// outside of it.
fn relocate_code(bytes: &mut [u8], from: Gva, to: Gva) -> Result<(), LinkError> {
    let end = from.add(bytes.len() as u64);
    let inside = |target: u64| from.0 <= target && target < end.0;
    let mut fixes = Vec::new();
    let mut decoder = Decoder::with_ip(64, bytes, from.0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        if insn.is_invalid() {
            return Err(bad("a replacement is not code"));
        }
        let places = decoder.get_constant_offsets(&insn);
        let start = usize::try_from(insn.ip().wrapping_sub(from.0)).unwrap_or(usize::MAX);
        let branch = insn.op0_kind() == OpKind::NearBranch64;
        if branch && !inside(insn.near_branch_target()) {
            fixes.push((start, places.immediate_offset(), places.immediate_size()));
        }
        if insn.is_ip_rel_memory_operand() && !inside(insn.ip_rel_memory_address()) {
            fixes.push((
                start,
                places.displacement_offset(),
                places.displacement_size(),
            ));
        }
    }
    for (start, offset, size) in fixes {
        let field = start
            .checked_add(offset)
            .and_then(|at| bytes.get_mut(at..)?.first_chunk_mut::<4>())
            .filter(|_| size == 4)
            .ok_or_else(|| bad("a short branch leads out of a replacement"))?;
        let old = i64::from(i32::from_le_bytes(*field));
        let new = old.wrapping_add_unsigned(from.since(to));
        let new =
            i32::try_from(new).map_err(|_| bad("a branch of a replacement is out of reach"))?;
        *field = new.to_le_bytes();
    }
    Ok(())
}

/// Replaces runs of one-byte NOPs with as few instructions as possible (`optimize_nops`).
fn join_nops(bytes: &mut [u8], at: Gva) {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        let start = decoder.position();
        decoder.decode_out(&mut insn);
        if insn.is_invalid() {
            return;
        }
        if bytes.get(start) == Some(&NOP1) {
            match runs.last_mut() {
                Some((from, len)) if *from + *len == start => *len += 1,
                _ => runs.push((start, 1)),
            }
        }
    }
    for (start, len) in runs {
        let mut rest = bytes.get_mut(start..start + len).unwrap_or_default();
        while !rest.is_empty() {
            let nop = NOPS
                .get(rest.len().min(NOPS.len()) - 1)
                .copied()
                .unwrap_or(&[NOP1]);
            let (head, tail) = rest.split_at_mut(nop.len());
            head.copy_from_slice(nop);
            rest = tail;
        }
    }
}

fn bad(why: &str) -> LinkError {
    LinkError::table(TABLE, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relocated_code_keeps_its_targets() {
        // call +0x1000; lea 0x2000(%rip),%rax; jmp over the next NOP (inside: must not change).
        let mut code = vec![
            0xe8, 0x00, 0x10, 0x00, 0x00, 0x48, 0x8d, 0x05, 0x00, 0x20, 0x00, 0x00, 0xeb, 0x01,
            0x90, 0x90,
        ];
        relocate_code(&mut code, Gva(0x5000), Gva(0x4000)).unwrap();
        assert_eq!(code[1..5], 0x2000i32.to_le_bytes());
        assert_eq!(code[8..12], 0x3000i32.to_le_bytes());
        assert_eq!(code[12..14], [0xeb, 0x01]);
    }

    #[test]
    fn code_that_cannot_be_relocated_is_an_error() {
        let far = Gva(0x5000).sub(1 << 40);
        assert!(relocate_code(&mut [0xe8, 0, 0x10, 0, 0], Gva(0x5000), far).is_err());
        assert!(relocate_code(&mut [0xeb, 0x40], Gva(0x5000), Gva(0x4000)).is_err());
        assert!(relocate_code(&mut [0x0f, 0x0a], Gva(0x5000), Gva(0x4000)).is_err());
    }

    #[test]
    fn nops_are_joined_only_where_they_are_instructions() {
        // mov $0x90909090,%eax; nop × 11
        let mut code = vec![0xb8, 0x90, 0x90, 0x90, 0x90];
        code.extend([0x90; 11]);
        join_nops(&mut code, Gva(0));
        assert_eq!(code[..5], [0xb8, 0x90, 0x90, 0x90, 0x90]);
        assert_eq!(code[5..13], *NOPS[7]);
        assert_eq!(code[13..], *NOPS[2]);
    }
}
