//! Instructions that are written into a guest: their lengths, their bytes, and how far they reach.
//!
//! This module knows x86 code only: no guest memory, no tasks.

pub mod entry_stub;

use iced_x86::IcedError;
use introspect::Gva;

/// Length of a function's ftrace site, in bytes: a five-byte NOP, or the jump in its place.
pub const SITE_LEN: usize = 5;

/// The one-byte NOP.
pub const NOP1: u8 = 0x90;

/// The two-byte NOP (`arch/x86/include/asm/nops.h: BYTES_NOP2`).
pub const NOP2: [u8; 2] = [0x66, NOP1];

/// The five-byte NOP of every 64-bit CPU (`nops.h: BYTES_NOP5`).
pub const NOP5: [u8; SITE_LEN] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The five-byte NOP of older CPUs that kernels before 5.13 may choose (`nops.h: K8_NOP5_ATOMIC`).
pub const NOP5_K8: [u8; SITE_LEN] = [0x66, 0x66, 0x66, 0x66, 0x90];

/// The NOPs of one to eight bytes (`nops.h: BYTES_NOP1` to `BYTES_NOP8`).
pub const NOPS: [&[u8]; 8] = [
    &[NOP1],
    &NOP2,
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &NOP5,
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// INT3, with which the linker and the kernel fill gaps in text.
pub const INT3: u8 = 0xcc;

/// Opcode of a near return.
pub const RET: u8 = 0xc3;

/// Opcode of a call with a 32-bit displacement.
pub const CALL: u8 = 0xe8;

/// Opcode of a jump with a 32-bit displacement.
pub const JMP32: u8 = 0xe9;

/// Opcode of a jump with an 8-bit displacement.
pub const JMP8: u8 = 0xeb;

/// Why an instruction or a stub cannot be encoded for the addresses at hand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The distance does not fit in a 32-bit displacement.
    #[error("{to} is out of reach of a jump at {from}")]
    OutOfReach {
        /// Address of the jump.
        from: Gva,
        /// Address of its target.
        to: Gva,
    },
    /// The assembler failed.
    #[error("assembling the stub at {at}: {why}")]
    Assembler {
        /// Address that the stub was meant for.
        at: Gva,
        /// The assembler's message.
        why: String,
    },
}

/// The five bytes of a jump at `from` to `to`.
///
/// # Errors
/// [`EncodeError::OutOfReach`].
pub fn jump(from: Gva, to: Gva) -> Result<[u8; SITE_LEN], EncodeError> {
    let distance = to.since(from.add(5)).cast_signed();
    let rel = i32::try_from(distance).map_err(|_| EncodeError::OutOfReach { from, to })?;
    let [a, b, c, d] = rel.to_le_bytes();
    Ok([JMP32, a, b, c, d])
}

/// The code that `assemble` makes for `at`, if it has at most `max_len` bytes and reaches its
/// `targets` from there.
///
/// # Errors
/// [`EncodeError`].
pub fn assemble_within(
    at: Gva,
    max_len: u64,
    targets: [Gva; 2],
    assemble: impl FnOnce() -> Result<Vec<u8>, IcedError>,
) -> Result<Vec<u8>, EncodeError> {
    for target in targets {
        // The assembler would silently make an indirect jump or call of one that does not reach.
        jump(at, target)?;
        jump(at.add(max_len), target)?;
    }
    let fail = |why: String| EncodeError::Assembler { at, why };
    let code = assemble().map_err(|e| fail(e.to_string()))?;
    if u64::try_from(code.len()).is_ok_and(|len| len <= max_len) {
        Ok(code)
    } else {
        Err(fail(format!(
            "{} bytes do not fit in {max_len}",
            code.len()
        )))
    }
}
