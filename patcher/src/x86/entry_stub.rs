//! The stub that a patched function's entry jumps to in a transition.
//!
//! Outside a transition, a patched function's entry is one direct jump to the new function. In a
//! transition it jumps to a stub. The stub reads the running task's patch state, as
//! `kernel/livepatch/patch.c: klp_ftrace_handler` does, or, in a kernel without `CONFIG_LIVEPATCH`,
//! looks the task up in the table of pending tasks. It then jumps on either to the new function or
//! to the previous one (for the original function, past its ftrace site).
//!
//! This module knows x86 code only: no guest memory, no tasks.

use iced_x86::code_asm::{CodeAssembler, dword_ptr, qword_ptr, r10, r10d, r11, r11d};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use introspect::Gva;

use crate::x86::{EncodeError, assemble_within};

/// Knuth's multiplicative hash: 2^32 over the golden ratio.
const FACTOR: u32 = 0x9e37_79b1;

/// Where a stub reads whether the running task has switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSource {
    /// In `task_struct.patch_state`, at this offset: 0 leads to the previous function, any other
    /// value to the new one, as in the kernel's own handler.
    PatchState(u32),
    /// In the table of the tasks that have not switched, which
    /// [`pending_tasks`](crate::transition::pending_tasks) fills.
    PendingTasks(PendingTable),
}

impl StateSource {
    /// The most bytes that [`stub`] returns.
    #[must_use]
    pub fn max_stub_len(self) -> u64 {
        match self {
            StateSource::PatchState(_) => 48,
            StateSource::PendingTasks(_) => 112,
        }
    }
}

/// The addresses of a table of pending tasks, as its stubs use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingTable {
    /// Address of the first slot.
    pub slots: Gva,
    /// The number of slots: a power of two.
    pub count: u64,
    /// Address of a word that is 0 while the tasks in the table run the previous functions, and 1
    /// while they run the new ones.
    pub reverting: Gva,
}

impl PendingTable {
    /// The number of the slot at which the search for a task begins.
    #[must_use]
    pub fn first(self, task: Gva) -> u64 {
        // The lower half of an address identifies a task_struct.
        let [a, b, c, d, ..] = task.0.to_le_bytes();
        let low = u32::from_le_bytes([a, b, c, d]);
        u64::from(low.wrapping_mul(FACTOR) >> self.shift())
    }

    /// By how many bits the stub shifts a 32-bit hash to the right.
    #[must_use]
    pub fn shift(self) -> u32 {
        32 - self.count.max(2).ilog2()
    }
}

/// How the kernel's own code reads `current`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurrentVar {
    /// `%gs:OFFSET`, where per-CPU symbols start at zero.
    Absolute(u32),
    /// `%gs:symbol(%rip)`, where per-CPU symbols are image addresses.
    RipRelative(Gva),
}

/// The stub for address `at`. It jumps to `previous` for a task in the old state and to `new` for a
/// task in the new one.
///
/// It uses `r10`, `r11` and the flags only: at a function's entry they are free, and every other
/// register may hold an argument.
///
/// # Errors
/// [`EncodeError`].
pub fn stub(
    at: Gva,
    current: CurrentVar,
    source: StateSource,
    previous: Gva,
    new: Gva,
) -> Result<Vec<u8>, EncodeError> {
    assemble_within(at, source.max_stub_len(), [previous, new], || {
        assemble(at, current, source, previous, new)
    })
}

fn assemble(
    at: Gva,
    current: CurrentVar,
    source: StateSource,
    previous: Gva,
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
    match source {
        StateSource::PatchState(offset) => {
            let mut to_previous = a.create_label();
            a.cmp(dword_ptr(r11 + offset), 0)?;
            a.je(to_previous)?;
            a.jmp(new.0)?;
            a.set_label(&mut to_previous)?;
            a.jmp(previous.0)?;
        }
        StateSource::PendingTasks(table) => search_table(&mut a, table, previous, new)?,
    }
    a.assemble(at.0)
}

/// Appends the search in the table of [`pending_tasks`](crate::transition::pending_tasks) for the
/// task in `r11`. Addresses in hidden windows are sign-extended 32-bit ones, as those of the
/// kernel's image are.
fn search_table(
    a: &mut CodeAssembler,
    table: PendingTable,
    previous: Gva,
    new: Gva,
) -> Result<(), IcedError> {
    let (mut next, mut found, mut to_previous) =
        (a.create_label(), a.create_label(), a.create_label());
    let mut absent = a.create_label();
    let slots = table.slots.0.cast_signed();
    // No table is larger.
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
    a.jne(to_previous)?;
    a.jmp(new.0)?;
    a.set_label(&mut found)?;
    a.cmp(dword_ptr(table.reverting.0.cast_signed()), 0)?;
    a.je(to_previous)?;
    a.jmp(new.0)?;
    a.set_label(&mut to_previous)?;
    a.jmp(previous.0)
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
    const PREVIOUS: Gva = Gva(0xffff_ffff_8123_4009);
    const NEW: Gva = Gva(0xffff_ffff_81a0_0000);

    #[test]
    fn stub_reads_absolute_current() {
        let source = StateSource::PatchState(5212);
        let code = stub(AT, CurrentVar::Absolute(0x1fb80), source, PREVIOUS, NEW).unwrap();
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
    fn stub_searches_the_table() {
        let table = PendingTable {
            slots: Gva(0xffff_ffff_ff20_0040),
            count: 1024,
            reverting: Gva(0xffff_ffff_ff20_0000),
        };
        let source = StateSource::PendingTasks(table);
        let code = stub(AT, CurrentVar::Absolute(0x1fb80), source, PREVIOUS, NEW).unwrap();
        assert!(code.len() as u64 <= source.max_stub_len(), "{}", code.len());
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
    fn stub_reads_rip_relative_current() {
        let symbol = Gva(0xffff_ffff_8300_0040);
        let source = StateSource::PatchState(5772);
        let code = stub(AT, CurrentVar::RipRelative(symbol), source, PREVIOUS, NEW).unwrap();
        let first = Decoder::with_ip(64, &code, AT.0, DecoderOptions::NONE).decode();
        assert!(first.is_ip_rel_memory_operand());
        assert_eq!(first.ip_rel_memory_address(), symbol.0);
        assert_eq!(first.segment_prefix(), Register::GS);
    }

    #[test]
    fn a_jump_out_of_reach_is_an_error() {
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
