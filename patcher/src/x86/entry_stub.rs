//! The code that stands at a patched function's entry, and the stub that it goes through in a transition.
//!
//! Outside a transition a patched function's entry is one direct jump to the new function. In a transition it jumps to a stub
//! of our own, which asks the running task's patch state, as `kernel/livepatch/patch.c: klp_ftrace_handler` does, and goes on
//! either to the new function or to the old one behind its entry site. Knows x86 code only: no guest memory, no tasks.

use iced_x86::code_asm::{CodeAssembler, dword_ptr, qword_ptr, r10, r10d, r11, r11d};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use introspect::Gva;

use crate::x86::EncodeError;
use crate::x86::fitted;

/// Knuth's multiplicative hash: 2^32 over the golden ratio.
const FACTOR: u32 = 0x9e37_79b1;

/// How a stub learns whether the running task has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSource {
    /// By `task_struct.patch_state`, at this offset: 0 gets the old code, any other the new, as the kernel's own handler chooses.
    PatchState(u32),
    /// By the table of those who have not, as [`pending`](crate::transition::pending_tasks) has it.
    PendingTasks(PendingTable),
}

impl StateSource {
    /// Room for one stub; [`stub`] never yields more.
    #[must_use]
    pub fn stub_room(self) -> u64 {
        match self {
            StateSource::PatchState(_) => 48,
            StateSource::PendingTasks(_) => 112,
        }
    }
}

/// Where a table lies, as its stubs need to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingTable {
    /// The slots.
    pub slots: Gva,
    /// How many there are: a power of two.
    pub count: u64,
    /// A word that is 0 while those in the table get the old code, and 1 while they get the new.
    pub reverting: Gva,
}

impl PendingTable {
    /// The slot at which the search for a task begins.
    #[must_use]
    pub fn first(self, task: Gva) -> u64 {
        // What identifies a task_struct is in its lower half.
        let [a, b, c, d, ..] = task.0.to_le_bytes();
        let low = u32::from_le_bytes([a, b, c, d]);
        u64::from(low.wrapping_mul(FACTOR) >> self.shift())
    }

    /// By how much the stub shifts a 32-bit hash.
    #[must_use]
    pub fn shift(self) -> u32 {
        32 - self.count.max(2).ilog2()
    }
}

/// How the kernel's own code finds `current`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurrentVar {
    /// `%gs:OFFSET`, where per-CPU symbols start at zero.
    Absolute(u32),
    /// `%gs:symbol(%rip)`, where per-CPU symbols are image addresses.
    RipRelative(Gva),
}

/// The stub at `at`: on to `old` for a task in the old state, to `new` for one in the new.
///
/// At a function's entry `r10`, `r11` and the flags carry nothing; every other register may carry an argument.
///
/// # Errors
/// [`EncodeError`].
pub fn stub(
    at: Gva,
    current: CurrentVar,
    ask: StateSource,
    old: Gva,
    new: Gva,
) -> Result<Vec<u8>, EncodeError> {
    fitted(at, ask.stub_room(), [old, new], || {
        assemble(at, current, ask, old, new)
    })
}

fn assemble(
    at: Gva,
    current: CurrentVar,
    ask: StateSource,
    old: Gva,
    new: Gva,
) -> Result<Vec<u8>, IcedError> {
    let (base, displacement) = match current {
        CurrentVar::Absolute(offset) => (Register::None, i64::from(offset)),
        CurrentVar::RipRelative(symbol) => (Register::RIP, symbol.0.cast_signed()),
    };
    let load_current = MemoryOperand::new(
        base,
        Register::None,
        1,
        displacement,
        8,
        false,
        Register::GS,
    );
    let mut a = CodeAssembler::new(64)?;
    a.add_instruction(Instruction::with2(
        Code::Mov_r64_rm64,
        Register::R11,
        load_current,
    )?)?;
    match ask {
        StateSource::PatchState(offset) => {
            let mut to_old = a.create_label();
            a.cmp(dword_ptr(r11 + offset), 0)?;
            a.je(to_old)?;
            a.jmp(new.0)?;
            a.set_label(&mut to_old)?;
            a.jmp(old.0)?;
        }
        StateSource::PendingTasks(table) => look_up(&mut a, table, old, new)?,
    }
    a.assemble(at.0)
}

/// The search of [`pending`](crate::transition::pending_tasks), for the task in `r11`. Window addresses are sign-extended 32-bit ones, as all of the
/// kernel's image is.
fn look_up(
    a: &mut CodeAssembler,
    table: PendingTable,
    old: Gva,
    new: Gva,
) -> Result<(), IcedError> {
    let (mut next, mut found, mut to_old) = (a.create_label(), a.create_label(), a.create_label());
    let mut absent = a.create_label();
    let slots = table.slots.0.cast_signed();
    // A table is no larger than that.
    let mask = u32::try_from(table.count - 1).unwrap_or(u32::MAX);
    a.mov(r10d, r11d)?;
    a.imul_3(r10d, r10d, FACTOR.cast_signed())?;
    a.shr(r10d, table.shift())?;
    a.set_label(&mut next)?;
    a.cmp(qword_ptr(r10 * 8 + slots), r11)?;
    a.je(found)?;
    a.cmp(qword_ptr(r10 * 8 + slots), 0)?;
    a.je(absent)?;
    a.inc(r10d)?;
    a.and(r10d, mask)?;
    a.jmp(next)?;
    a.set_label(&mut absent)?;
    a.cmp(dword_ptr(table.reverting.0.cast_signed()), 0)?;
    a.jne(to_old)?;
    a.jmp(new.0)?;
    a.set_label(&mut found)?;
    a.cmp(dword_ptr(table.reverting.0.cast_signed()), 0)?;
    a.je(to_old)?;
    a.jmp(new.0)?;
    a.set_label(&mut to_old)?;
    a.jmp(old.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::jump;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn listing(at: Gva, code: &[u8]) -> Vec<String> {
        let mut formatter = IntelFormatter::new();
        formatter.options_mut().set_rip_relative_addresses(false);
        Decoder::with_ip(64, code, at.0, DecoderOptions::NONE)
            .iter()
            .map(|i| {
                let mut text = String::new();
                formatter.format(&i, &mut text);
                text
            })
            .collect()
    }

    const AT: Gva = Gva(0xffff_ffff_8100_1000);
    const OLD: Gva = Gva(0xffff_ffff_8123_4009);
    const NEW: Gva = Gva(0xffff_ffff_81a0_0000);

    #[test]
    fn stub_asks_absolute_current() {
        let ask = StateSource::PatchState(5212);
        let code = stub(AT, CurrentVar::Absolute(0x1fb80), ask, OLD, NEW).unwrap();
        assert_eq!(
            listing(AT, &code),
            [
                "mov r11,gs:[1FB80h]",
                "cmp dword ptr [r11+145Ch],0",
                "je short 0FFFFFFFF81001018h",
                "jmp 0FFFFFFFF81A00000h",
                "jmp 0FFFFFFFF81234009h",
            ]
        );
    }

    #[test]
    fn stub_looks_the_task_up() {
        let table = PendingTable {
            slots: Gva(0xffff_ffff_ff20_0040),
            count: 1024,
            reverting: Gva(0xffff_ffff_ff20_0000),
        };
        let ask = StateSource::PendingTasks(table);
        let code = stub(AT, CurrentVar::Absolute(0x1fb80), ask, OLD, NEW).unwrap();
        assert!(code.len() as u64 <= ask.stub_room(), "{}", code.len());
        assert_eq!(
            listing(AT, &code),
            [
                "mov r11,gs:[1FB80h]",
                "mov r10d,r11d",
                "imul r10d,9E3779B1h",
                "shr r10d,16h",
                "cmp [r10*8-0DFFFC0h],r11",
                "je short 0FFFFFFFF81001047h",
                "cmp qword ptr [r10*8-0DFFFC0h],0",
                "je short 0FFFFFFFF81001038h",
                "inc r10d",
                "and r10d,3FFh",
                "jmp short 0FFFFFFFF81001017h",
                "cmp dword ptr [0FFFFFFFFFF200000h],0",
                "jne short 0FFFFFFFF81001056h",
                "jmp 0FFFFFFFF81A00000h",
                "cmp dword ptr [0FFFFFFFFFF200000h],0",
                "je short 0FFFFFFFF81001056h",
                "jmp 0FFFFFFFF81A00000h",
                "jmp 0FFFFFFFF81234009h",
            ]
        );
    }

    #[test]
    fn stub_asks_rip_relative_current() {
        let symbol = Gva(0xffff_ffff_8300_0040);
        let ask = StateSource::PatchState(5772);
        let code = stub(AT, CurrentVar::RipRelative(symbol), ask, OLD, NEW).unwrap();
        let first = Decoder::with_ip(64, &code, AT.0, DecoderOptions::NONE).decode();
        assert!(first.is_ip_rel_memory_operand());
        assert_eq!(first.ip_rel_memory_address(), symbol.0);
        assert_eq!(first.segment_prefix(), Register::GS);
    }

    #[test]
    fn jump_reaches_both_ways_and_says_when_not() {
        assert_eq!(jump(Gva(0x1000), Gva(0x1005)).unwrap(), [0xe9, 0, 0, 0, 0]);
        assert_eq!(
            jump(Gva(0x1000), Gva(0x1000)).unwrap(),
            [0xe9, 0xfb, 0xff, 0xff, 0xff]
        );
        assert!(jump(Gva(0x1000), Gva(0x1_8000_0000)).is_err());
        assert!(
            stub(
                AT,
                CurrentVar::Absolute(0),
                StateSource::PatchState(0),
                Gva(0xffff_8880_0000_0000),
                NEW
            )
            .is_err()
        );
    }
}
