//! Single steps by each kind of ORC entry.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::unwind::orc::OrcEncoding;

const TOP: Gva = Gva(0xffff_c900_0000_4000);
const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

#[derive(Default)]
struct Words(HashMap<Gva, u64>);

impl Words {
    fn put(&mut self, at: Gva, value: u64) -> &mut Self {
        self.0.insert(at, value);
        self
    }
}

impl StackMemory for Words {
    fn word(&mut self, at: Gva) -> Result<u64, Unreliable> {
        self.0
            .get(&at)
            .copied()
            .ok_or(Unreliable::BadStackPointer(at))
    }
}

fn cursor(sp: Gva, bp: u64) -> Cursor {
    Cursor {
        ip: TEXT,
        sp,
        bp,
        exact: false,
        retp: None,
        regs: None,
    }
}

fn entry(kind: OrcKind, sp: (OrcBase, i16), bp: (OrcBase, i16)) -> OrcEntry {
    OrcEntry {
        kind,
        sp_base: sp.0,
        sp_offset: sp.1,
        bp_base: bp.0,
        bp_offset: bp.1,
        signal: matches!(kind, OrcKind::Regs | OrcKind::PartialRegs),
    }
}

fn frame(step: Result<Step, Unreliable>) -> Cursor {
    match step {
        Ok(Step::Frame(cursor)) => cursor,
        other => panic!("expected a frame, got {other:?}"),
    }
}

#[test]
fn a_call_from_sp_restores_bp() {
    let mut stack = Words::default();
    stack.put(TOP.sub(8), TEXT.0 + 5).put(TOP.sub(16), 0xb0);
    let call = entry(OrcKind::Call, (OrcBase::Sp, 32), (OrcBase::PrevSp, -16));
    let next = frame(cursor(TOP.sub(32), 1).step(&call, &mut stack));
    assert_eq!(next.ip, TEXT.add(5));
    assert_eq!(next.sp, TOP);
    assert_eq!(next.bp, 0xb0);
    assert!(!next.exact);
}

#[test]
fn a_call_from_bp_keeps_bp_without_a_rule_for_it() {
    let mut stack = Words::default();
    stack.put(TOP.sub(8), TEXT.0);
    let call = entry(OrcKind::Call, (OrcBase::Bp, 16), (OrcBase::Undefined, 0));
    let next = frame(cursor(TOP.sub(64), TOP.0 - 16).step(&call, &mut stack));
    assert_eq!((next.sp, next.bp), (TOP, TOP.0 - 16));
}

#[test]
fn indirect_bases_load_before_or_after_adding_the_offset() {
    let mut stack = Words::default();
    stack.put(TOP.sub(64), TOP.0 - 8).put(TOP.sub(8), TEXT.0);
    let sp = entry(
        OrcKind::Call,
        (OrcBase::SpIndirect, 8),
        (OrcBase::Undefined, 0),
    );
    assert_eq!(frame(cursor(TOP.sub(64), 0).step(&sp, &mut stack)).sp, TOP);
    stack.put(TOP.sub(48), TOP.0);
    let bp = entry(
        OrcKind::Call,
        (OrcBase::BpIndirect, -8),
        (OrcBase::Undefined, 0),
    );
    assert_eq!(
        frame(cursor(Gva(0), TOP.0 - 40).step(&bp, &mut stack)).sp,
        TOP
    );
}

#[test]
fn a_register_that_the_frame_lacks_is_reported() {
    let mut stack = Words::default();
    stack.put(TOP.sub(8), TEXT.0);
    let drap = entry(OrcKind::Call, (OrcBase::R10, 0), (OrcBase::Undefined, 0));
    assert_eq!(
        cursor(TOP.sub(64), 0).step(&drap, &mut stack),
        Err(Unreliable::MissingRegister(TEXT))
    );
    let regs = VcpuRegs {
        r10: TOP.0,
        rip: TEXT.0,
        ..VcpuRegs::default()
    };
    let next = frame(Cursor::from_vcpu(&regs).step(&drap, &mut stack));
    assert_eq!(next.sp, TOP);
    assert_eq!(next.regs, None, "a caller's registers are not its callee's");
}

fn interrupted(cs: u64) -> Words {
    let mut stack = Words::default();
    let regs = TOP.sub(168);
    for offset in (0..168).step_by(8) {
        stack.put(regs.add(offset), 0x1000 + offset);
    }
    stack
        .put(regs.add(0x80), TEXT.0 + 7)
        .put(regs.add(0x88), cs)
        .put(regs.add(0x98), TOP.0 + 64);
    stack
}

#[test]
fn saved_registers_lead_to_an_exact_position_or_to_user_mode() {
    let regs = entry(OrcKind::Regs, (OrcBase::Sp, 0), (OrcBase::Undefined, 0));
    let next = frame(cursor(TOP.sub(168), 0).step(&regs, &mut interrupted(0x10)));
    assert_eq!(
        (next.ip, next.sp, next.exact),
        (TEXT.add(7), TOP.add(64), true)
    );
    assert_eq!(next.bp, 0x1020);
    assert_eq!(next.regs.map(|r| r.r13), Some(0x1010));
    // FRED uses the upper bits.
    let user = cursor(TOP.sub(168), 0).step(&regs, &mut interrupted(0x0003_0033));
    assert_eq!(user, Ok(Step::User { regs_end: TOP }));
}

#[test]
fn a_bare_interrupt_frame_keeps_the_registers_of_the_inner_frame() {
    let partial = entry(
        OrcKind::PartialRegs,
        (OrcBase::Sp, 0),
        (OrcBase::Undefined, 0),
    );
    let at = TOP.sub(40);
    let next = frame(cursor(at, 9).step(&partial, &mut interrupted(0x10)));
    assert_eq!((next.bp, next.regs), (9, None));
    let vcpu = VcpuRegs {
        rsp: at.0,
        rbp: 11,
        ..VcpuRegs::default()
    };
    let next = frame(Cursor::from_vcpu(&vcpu).step(&partial, &mut interrupted(0x10)));
    assert_eq!((next.bp, next.regs.map(|r| r.bp)), (11, Some(11)));
}

#[test]
fn undefined_and_end_entries_do_not_step() {
    let end = entry(
        OrcKind::End,
        (OrcBase::Undefined, 0),
        (OrcBase::Undefined, 0),
    );
    assert_eq!(
        cursor(TOP, 0).step(&end, &mut Words::default()),
        Err(Unreliable::NoOrc(TEXT))
    );
}

proptest! {
    #[test]
    fn no_registers_or_entry_panic(
        raw in any::<[u8; 6]>(),
        words in any::<[u64; 4]>(),
        value in any::<u64>(),
    ) {
        struct Same(u64);
        impl StackMemory for Same {
            fn word(&mut self, _: Gva) -> Result<u64, Unreliable> {
                Ok(self.0)
            }
        }
        let [ip, sp, bp, r10] = words;
        let regs = VcpuRegs { rip: ip, rsp: sp, rbp: bp, r10, ..VcpuRegs::default() };
        for entry in OrcEncoding::ALL.into_iter().filter_map(|e| e.decode(raw)) {
            let _ = Cursor::from_vcpu(&regs).step(&entry, &mut Same(value));
        }
    }
}
