//! The last check of linked code: every instruction decodes, and no call was left unlinked.

use std::collections::HashSet;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use introspect::Gva;

use crate::module::error::LinkError;
use crate::module::link::image::{Buffer, Image};

/// The most bytes that are decoded, so that overlapping symbols of a hostile module do not cost
/// more.
const MAX_DECODED: u64 = 64 << 20;

pub(in crate::module) fn check(image: &Image) -> Result<(), LinkError> {
    let code = Buffer {
        base: image.code_base,
        bytes: image.code.clone(),
    };
    let named = image
        .symbols
        .iter()
        .filter(|s| s.function && image.text.contains(s.address))
        .map(|s| (s.name.as_str(), s.address, s.size));
    let patched = image
        .functions
        .iter()
        .map(|f| (f.old_name.as_str(), f.new, f.new_size));
    let mut seen = HashSet::new();
    let mut total = 0u64;
    for (name, start, size) in named.chain(patched) {
        if !seen.insert((start, size)) {
            continue;
        }
        total = total.saturating_add(size);
        if total > MAX_DECODED {
            return Err(wrong(name, start, "its functions overlap"));
        }
        check_function(&code, name, start, size)?;
    }
    Ok(())
}

fn check_function(code: &Buffer, name: &str, start: Gva, size: u64) -> Result<(), LinkError> {
    let bytes = usize::try_from(size)
        .ok()
        .and_then(|size| code.get(start, size))
        .ok_or_else(|| wrong(name, start, "it is not in the code region"))?;
    let mut decoder = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let at = Gva(insn.ip());
        if insn.is_invalid() {
            return Err(wrong(name, at, "these bytes are not an instruction"));
        }
        // A relative call without a relocation has displacement 0. Only position-independent 32-bit
        // code calls the next instruction.
        if insn.flow_control() == FlowControl::Call && insn.near_branch_target() == insn.next_ip() {
            return Err(wrong(name, at, "this call was never linked"));
        }
    }
    Ok(())
}

fn wrong(function: &str, at: Gva, why: &'static str) -> LinkError {
    LinkError::Code {
        function: function.to_owned(),
        at,
        why,
    }
}
