//! `.return_sites`: turns each `jmp __x86_return_thunk` into the return that this CPU's mitigations
//! need.
//!
//! Since 6.9 a return that is left as it is runs into `warn_thunk_thunk`, a WARN. This module
//! follows `arch/x86/kernel/alternative.c: apply_returns`: the kernel's variable `x86_return_thunk`
//! says where returns go; while it has its initial value, they are plain `ret`s.

use introspect::Gva;

use crate::module::error::{LinkError, TargetError};
use crate::module::kernel::TargetKernel;
use crate::module::link::linker::Linker;
use crate::x86::{INT3, JMP32, RET};

const TABLE: &str = ".return_sites";
const MAX_SITES: usize = 1_000_000;
/// An entry is the 32-bit distance from itself to the jump.
const ENTRY_SIZE: u64 = 4;
/// `ret`, and `int3` against straight-line speculation.
const PLAIN_RETURN: [u8; 5] = [RET, INT3, INT3, INT3, INT3];

pub(in crate::module) fn apply<T: TargetKernel + ?Sized>(
    linker: &mut Linker<'_>,
    target: &T,
) -> Result<(), LinkError> {
    let Some(table) = linker.table(TABLE) else {
        return Ok(());
    };
    // A kernel without return thunks exports none, and modules for it have no such table.
    let variable = target
        .symbol("x86_return_thunk")
        .ok_or(TargetError::NoSymbol("x86_return_thunk"))?;
    let default = target
        .symbol("__x86_return_thunk")
        .ok_or(TargetError::NoSymbol("__x86_return_thunk"))?;
    let mut thunk = [0; 8];
    target.read("the return thunk in use", variable, &mut thunk)?;
    let thunk = Gva(u64::from_le_bytes(thunk));
    for offset in table.offsets(ENTRY_SIZE, "return sites", MAX_SITES)? {
        if let Some(site) = linker.table_address(table, offset)? {
            apply_one(linker, site, default, thunk)?;
        }
    }
    Ok(())
}

fn apply_one(
    linker: &mut Linker<'_>,
    site: Gva,
    default: Gva,
    thunk: Gva,
) -> Result<(), LinkError> {
    let jump = linker
        .code
        .get_mut(site, 5)
        .ok_or_else(|| bad(format!("{site} is not in the code of the patch")))?;
    let goes_to = match jump {
        &mut [JMP32, a, b, c, d] => site
            .add(5)
            .offset(i64::from(i32::from_le_bytes([a, b, c, d]))),
        _ => return Err(bad(format!("no jump at {site}"))),
    };
    if goes_to != default {
        return Err(bad(format!(
            "the jump at {site} does not go to the return thunk"
        )));
    }
    if thunk == default {
        jump.copy_from_slice(&PLAIN_RETURN);
        return Ok(());
    }
    let distance = thunk.since(site.add(5)).cast_signed();
    let distance =
        i32::try_from(distance).map_err(|_| bad("the return thunk is out of reach".into()))?;
    if let Some(field) = jump.get_mut(1..) {
        field.copy_from_slice(&distance.to_le_bytes());
    }
    Ok(())
}

fn bad(why: String) -> LinkError {
    LinkError::table(TABLE, why)
}
