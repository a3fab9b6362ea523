//! The livepatch state of a kernel that BTF does not describe: TIF_PATCH_PENDING and
//! `klp_target_state`, read from the code of functions that use them.
//!
//! TIF bits are macros, so no type has them, and their numbers changed around 6.17. The bit that a
//! function clears or tests is an immediate in its code, at run time as in the file. Each bit is
//! read together with something that is known otherwise (an address from kallsyms, an offset from
//! BTF), and the two must agree.

use crate::addr::Gva;
use crate::kernel::layout::Layout;
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::symbols::{SymbolError, Symbols};

/// The function that switches a task (`kernel/livepatch/transition.c`).
const UPDATE: &str = "klp_update_patch_state";
const TARGET: &str = "klp_target_state";
/// The most bytes of its code that are read; it has about 100.
const MAX_CODE: u64 = 512;

/// Where a kernel with `CONFIG_LIVEPATCH` keeps the state of a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KlpState {
    /// The number of the bit `TIF_PATCH_PENDING` in `thread_info.flags`, below 64.
    pub pending_bit: u32,
    /// Where `task_struct.patch_state` lies.
    pub patch_state: Field,
    /// The address of `klp_target_state`.
    pub target_state: Gva,
}

/// Why the livepatch state of a kernel with `CONFIG_LIVEPATCH` cannot be located.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KlpError {
    /// A symbol is missing, or is ambiguous.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The code cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The code is not as expected.
    #[error("the code of {UPDATE} at {at} does not show {what}")]
    Code {
        /// The address of the function.
        at: Gva,
        /// What the code should show.
        what: &'static str,
    },
    /// The code and BTF disagree on where `patch_state` is.
    #[error("{UPDATE} stores at offset {code:#x}, but BTF has task_struct.patch_state at {btf:#x}")]
    Disagree {
        /// The offset in the code, in bytes.
        code: u64,
        /// The offset in BTF, in bytes.
        btf: u64,
    },
}

impl KlpState {
    /// Reads it from the kernel's symbols, types and code; `None` without `CONFIG_LIVEPATCH`.
    pub(crate) fn find(
        symbols: &Symbols,
        layout: &Layout,
        memory: &KernelMemory<'_>,
    ) -> Result<Option<KlpState>, KlpError> {
        let Some(patch_state) = layout.task.patch_state.filter(|_| symbols.contains(UPDATE)) else {
            return Ok(None);
        };
        let range = symbols.range(UPDATE)?;
        let target_state = symbols.address(TARGET)?;
        let code = memory.bytes(range.start, range.len().min(MAX_CODE), 512)?;
        let pending_bit = pending_bit(&code, range.start, target_state, patch_state)?;
        Ok(Some(KlpState {
            pending_bit,
            patch_state,
            target_state,
        }))
    }
}

/// Reads the bit from the function's code: `lock btr $bit,(%rdi)` (the test and clear of
/// `task_thread_info(task)->flags`), then `mov klp_target_state(%rip),%eax` and `mov
/// %eax,patch_state(%rdi)`.
fn pending_bit(code: &[u8], start: Gva, target: Gva, state: Field) -> Result<u32, KlpError> {
    let missing = |what| KlpError::Code { at: start, what };
    // The flags are the first word of the task, so (%rdi) has no displacement. On one CPU the
    // kernel replaces each lock prefix by one that does nothing (`alternatives_smp_unlock`).
    let (clear, bit) = [
        &[0xf0, 0x48, 0x0f, 0xba, 0x37][..],
        &[0x3e, 0x48, 0x0f, 0xba, 0x37],
        &[0xf0, 0x0f, 0xba, 0x37],
        &[0x3e, 0x0f, 0xba, 0x37],
    ]
    .iter()
    .find_map(|opcode| {
        let at = position(code, opcode)? + opcode.len();
        Some((at, *code.get(at)?))
    })
    .ok_or(missing("the instruction that clears its TIF bit"))?;
    let load = loads_of(code, start, target)
        .find(|&at| at > clear)
        .ok_or(missing("the instruction that reads klp_target_state"))?;
    let rest = code.get(load..).unwrap_or_default();
    let store = position(rest, &[0x89, 0x87]).map(|at| load + at + 2);
    let offset = store
        .and_then(|at| word(code, at))
        .ok_or(missing("the instruction that stores the patch state"))?;
    if u64::from(offset) != state.offset {
        return Err(KlpError::Disagree {
            code: u64::from(offset),
            btf: state.offset,
        });
    }
    if bit >= 64 {
        return Err(missing("a TIF bit below 64"));
    }
    Ok(u32::from(bit))
}

/// Offsets of `mov target(%rip),%eax` in the code.
fn loads_of(code: &[u8], start: Gva, target: Gva) -> impl Iterator<Item = usize> {
    code.windows(6).enumerate().filter_map(move |(at, bytes)| {
        let displacement = word(bytes, 2)?.cast_signed();
        let next = start.add(at as u64 + 6);
        (bytes.starts_with(&[0x8b, 0x05]) && next.offset(i64::from(displacement)) == target)
            .then_some(at)
    })
}

fn position(code: &[u8], opcode: &[u8]) -> Option<usize> {
    code.windows(opcode.len()).position(|bytes| bytes == opcode)
}

fn word(code: &[u8], at: usize) -> Option<u32> {
    let raw = code.get(at..at.checked_add(4)?)?;
    raw.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Gva = Gva(0xffff_ffff_8110_0000);
    const TARGET: Gva = Gva(0xffff_ffff_8301_2344);
    const STATE: Field = Field {
        offset: 0x145c,
        size: 4,
    };

    fn code(bit: u8, state: u32) -> Vec<u8> {
        let mut code = vec![0x0f, 0x1f, 0x44, 0, 0, 0xf0, 0x48, 0x0f, 0xba, 0x37, bit];
        code.extend([0x73, 0x0c, 0x8b, 0x05]);
        let next = START.add(code.len() as u64 + 4);
        code.extend((TARGET.since(next) as u32).to_le_bytes());
        code.extend([0x89, 0x87]);
        code.extend(state.to_le_bytes());
        code.push(0xc3);
        code
    }

    #[test]
    fn the_bit_is_read_where_code_and_types_agree() {
        assert_eq!(pending_bit(&code(13, 0x145c), START, TARGET, STATE), Ok(13));
        assert_eq!(pending_bit(&code(9, 0x145c), START, TARGET, STATE), Ok(9));
    }

    #[test]
    fn a_lock_prefix_replaced_on_one_cpu_is_understood() {
        let mut code = code(13, 0x145c);
        code[5] = 0x3e;
        assert_eq!(pending_bit(&code, START, TARGET, STATE), Ok(13));
    }

    #[test]
    fn disagreement_is_an_error() {
        assert_eq!(
            pending_bit(&code(13, 0x1460), START, TARGET, STATE),
            Err(KlpError::Disagree {
                code: 0x1460,
                btf: 0x145c
            })
        );
        assert!(pending_bit(&code(64, 0x145c), START, TARGET, STATE).is_err());
        assert!(pending_bit(&code(13, 0x145c), START, TARGET.add(4), STATE).is_err());
    }

    #[test]
    fn code_that_ends_early_is_an_error() {
        let code = code(13, 0x145c);
        for len in 0..code.len() - 1 {
            assert!(pending_bit(&code[..len], START, TARGET, STATE).is_err());
        }
    }
}
