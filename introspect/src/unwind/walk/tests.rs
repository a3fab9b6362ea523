//! Walks over small stacks that are built word by word.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::addr::Gva;
use crate::kernel::{StackArea, StackType};
use crate::unwind::code_map::tests::{CALL8, END, TEXT, range};
use crate::unwind::code_map::{CodeClass, CodeRegion, CoreText};
use crate::unwind::orc::OrcEncoding;
use crate::unwind::orc_table::OrcTable;
use crate::unwind::ret_addrs::tests::{self, GRAPH, TASK as OWNER};
use crate::unwind::ret_addrs::{RetAddrs, TracerRecords};
use crate::unwind::stack_memory::tests::{IRQ, SIZE, TASK, area};

const TOP: Gva = TASK.add(SIZE);
const KTHREAD_ENTRY: Gva = TEXT.add(0x200);
const ENTRY: Gva = TEXT.add(0x300);
const SYSCALL: Gva = TEXT.add(0x320);
const INTERRUPTED: Gva = TEXT.add(0x340);
const SWITCHES_STACK: Gva = TEXT.add(0x360);
const STUCK: Gva = TEXT.add(0x380);
const BREAKPOINT: Gva = TEXT.add(0x500);

fn map() -> CodeMap {
    let orc = OrcTable::from_unsorted(
        vec![
            (TEXT, CALL8),
            (KTHREAD_ENTRY, END),
            (ENTRY, END),
            (SYSCALL, [0, 0, 0, 0, 5, 3 | 8]),
            (INTERRUPTED, [0, 0, 0, 0, 5, 4 | 8]),
            (SWITCHES_STACK, [8, 0, 0, 0, 9, 2]),
            (STUCK, [0, 0, 0, 0, 5, 2]),
            (TEXT.add(0x400), CALL8),
        ],
        OrcEncoding::Typed,
    )
    .unwrap();
    CodeMap::new(CoreText {
        text: range(TEXT, 0x1000),
        init: range(Gva(0), 0),
        orc,
        special: vec![
            (range(KTHREAD_ENTRY, 0x100), CodeClass::TaskEntry),
            (range(ENTRY, 0x20), CodeClass::UserEntry),
            (range(BREAKPOINT, 0x20), CodeClass::Breakpoint),
            (range(GRAPH, 0x20), CodeClass::Traced),
        ],
    })
}

/// Guest memory of 64-bit words; words that were not set are zero.
#[derive(Default)]
struct Guest(HashMap<u64, u64>);

impl Guest {
    fn put(mut self, at: Gva, value: Gva) -> Self {
        self.0.insert(at.0, value.0);
        self
    }

    /// A `pt_regs` at `at`.
    fn regs(self, at: Gva, ip: Gva, cs: u64, sp: Gva) -> Self {
        self.put(at.add(0x80), ip)
            .put(at.add(0x88), Gva(cs))
            .put(at.add(0x98), sp)
    }
}

impl ReadMemory for Guest {
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva> {
        for (bytes, i) in buf.chunks_mut(8).zip(0u64..) {
            let word = self.0.get(&at.add(8 * i).0).copied().unwrap_or(0);
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
        Ok(())
    }
}

const AREAS: [StackArea; 2] = [
    StackArea {
        kind: StackType::Task,
        range: crate::GvaRange::new(TASK, TOP),
    },
    StackArea {
        kind: StackType::Irq,
        range: crate::GvaRange::new(IRQ, IRQ.add(SIZE)),
    },
];

fn walk_from(guest: &Guest, ip: Gva, sp: Gva, exact: bool) -> Stack {
    let start = Cursor {
        ip,
        sp,
        bp: 0,
        exact,
        retp: None,
        regs: None,
    };
    let origin = Origin {
        running: exact,
        ..Origin::default()
    };
    walk(guest, start, origin)
}

/// Walks a stack of a task without records of tracers.
fn walk(guest: &Guest, start: Cursor, origin: Origin) -> Stack {
    let records = TracerRecords::default();
    let ret_addrs = RetAddrs::new(&records, guest, OWNER, false);
    let mut stacks = WalkMemory::new(guest, &AREAS);
    walk_stack(&map(), &mut stacks, ret_addrs, start, origin)
}

fn ips(stack: &Stack) -> Vec<Gva> {
    stack.frames.iter().map(|frame| frame.ip).collect()
}

#[test]
fn a_kernel_thread_ends_at_its_entry() {
    let entry = KTHREAD_ENTRY.add(0x22);
    let guest = Guest::default()
        .put(TOP.sub(0x100), TEXT.add(0x40))
        .put(TOP.sub(0xf8), entry);
    let stack = walk_from(&guest, TEXT.add(0x10), TOP.sub(0x100), false);
    assert_eq!(stack.verdict, Verdict::Reliable);
    assert_eq!(ips(&stack), [TEXT.add(0x10), TEXT.add(0x40), entry]);
}

/// A kernel thread that sleeps in a function that was called from `TEXT + 0x40`, which was called
/// from its entry. The graph tracer has replaced both return addresses.
fn traced(entry: Gva) -> Guest {
    let (inner, outer) = (TOP.sub(0x100), TOP.sub(0xf8));
    let records = Gva(0xffff_8880_0002_0000);
    Guest::default()
        .put(inner, GRAPH)
        .put(outer, GRAPH)
        .put(OWNER.add(0x10), records)
        .put(OWNER.add(0x1c), Gva(1))
        .put(records, entry)
        .put(records.add(0x10), outer)
        .put(records.add(0x18), TEXT.add(0x40))
        .put(records.add(0x28), inner)
}

fn walk_traced(guest: &Guest) -> Stack {
    let records = tests::graph(false);
    let ret_addrs = RetAddrs::new(&records, guest, OWNER, false);
    let start = Cursor {
        ip: TEXT.add(0x10),
        sp: TOP.sub(0x100),
        bp: 0,
        exact: false,
        retp: None,
        regs: None,
    };
    let mut stacks = WalkMemory::new(guest, &AREAS);
    walk_stack(&map(), &mut stacks, ret_addrs, start, Origin::default())
}

#[test]
fn addresses_that_a_tracer_replaced_are_recovered() {
    let entry = KTHREAD_ENTRY.add(0x22);
    let stack = walk_traced(&traced(entry));
    assert_eq!(stack.verdict, Verdict::Reliable);
    assert_eq!(ips(&stack), [TEXT.add(0x10), TEXT.add(0x40), entry]);
    // The same address again and again, without end.
    let endless = walk_traced(&traced(GRAPH));
    let traced_at = Verdict::Unreliable(Unreliable::Traced(GRAPH));
    assert_eq!(endless.verdict, traced_at);
    assert_eq!(ips(&endless), [TEXT.add(0x10), TEXT.add(0x40)]);
}

#[test]
fn records_that_do_not_fit_the_stack_make_it_unreliable() {
    let entry = KTHREAD_ENTRY.add(0x22);
    let traced_at = Verdict::Unreliable(Unreliable::Traced(GRAPH));
    let without_a_record = traced(entry).put(OWNER.add(0x1c), Gva(u64::MAX));
    assert_eq!(walk_traced(&without_a_record).verdict, traced_at);
    let with_one_too_many = traced(entry).put(TOP.sub(0xf8), entry);
    let stack = walk_traced(&with_one_too_many);
    assert_eq!(stack.verdict, traced_at);
    assert_eq!(ips(&stack), [TEXT.add(0x10), TEXT.add(0x40), entry]);
    let not_text = walk_traced(&traced(Gva(0x1234)));
    let expected = Verdict::Unreliable(Unreliable::NotText(Gva(0x1234)));
    assert_eq!(not_text.verdict, expected);
}

#[test]
fn the_same_end_far_from_the_top_is_refused() {
    let guest = Guest::default().put(TASK.add(0x100), KTHREAD_ENTRY.add(0x22));
    let stack = walk_from(&guest, TEXT.add(0x10), TASK.add(0x100), false);
    assert_eq!(
        stack.verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(TASK.add(0x108)))
    );
}

#[test]
fn a_system_call_ends_at_user_registers() {
    let regs = TOP.sub(168);
    let guest = Guest::default().put(regs.sub(8), SYSCALL.add(4)).regs(
        regs,
        Gva(0x40_0000),
        0x33,
        Gva(0x7fff_0000),
    );
    let stack = walk_from(&guest, TEXT.add(0x10), regs.sub(8), false);
    assert!(stack.is_reliable());
    assert_eq!(ips(&stack), [TEXT.add(0x10), SYSCALL.add(4)]);
}

#[test]
fn a_breakpoint_is_accepted_only_when_it_hit_user_mode() {
    let hit = |cs, ip| {
        let regs = TOP.sub(168);
        let guest = Guest::default()
            .put(regs.sub(16), BREAKPOINT.add(8))
            .put(regs.sub(8), SYSCALL.add(4))
            .regs(regs, ip, cs, TOP);
        walk_from(&guest, TEXT.add(0x10), regs.sub(16), false).verdict
    };
    assert_eq!(hit(0x33, Gva(0x40_0000)), Verdict::Reliable);
    assert_eq!(
        hit(0x10, TEXT.add(0x20)),
        Verdict::Unreliable(Unreliable::TransientCode(BREAKPOINT.add(8)))
    );
}

#[test]
fn user_registers_in_the_middle_of_a_stack_are_refused() {
    let regs = TOP.sub(0x200);
    let guest = Guest::default().put(regs.sub(8), SYSCALL.add(4)).regs(
        regs,
        Gva(0x40_0000),
        0x33,
        Gva(0x7fff_0000),
    );
    let stack = walk_from(&guest, TEXT.add(0x10), regs.sub(8), false);
    assert_eq!(
        stack.verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(regs.add(168)))
    );
}

#[test]
fn an_interrupt_on_its_own_stack() {
    let saved = IRQ.add(SIZE).sub(8);
    let regs = TOP.sub(0x200);
    let guest = Guest::default()
        .put(saved.sub(8), SWITCHES_STACK.add(5))
        .put(saved, regs.sub(8))
        .put(regs.sub(8), SYSCALL.add(2))
        .regs(regs, TEXT.add(0x80), 0x10, TOP.sub(0x100))
        .put(TOP.sub(0x100), KTHREAD_ENTRY.add(0x22));
    let stack = walk_from(&guest, TEXT.add(0x10), saved.sub(8), true);
    assert_eq!(stack.verdict, Verdict::Reliable);
    let exact: Vec<_> = stack.frames.iter().map(|f| (f.ip, f.exact)).collect();
    assert_eq!(
        exact,
        [
            (TEXT.add(0x10), true),
            (SWITCHES_STACK.add(5), false),
            (SYSCALL.add(2), false),
            (TEXT.add(0x80), true),
            (KTHREAD_ENTRY.add(0x22), false),
        ]
    );
}

#[test]
fn entry_code_ends_only_the_stack_of_a_running_task() {
    let guest = Guest::default();
    let user_sp = Gva(0x7fff_1234);
    let stack = walk_from(&guest, ENTRY.add(3), user_sp, true);
    assert!(stack.is_reliable());
    assert_eq!(ips(&stack), [ENTRY.add(3)]);
    // A sleeping task cannot be there: its saved frame was overwritten.
    let start = Cursor {
        ip: ENTRY.add(3),
        sp: user_sp,
        bp: 0,
        exact: true,
        retp: None,
        regs: None,
    };
    let sleeping = walk(&guest, start, Origin::default());
    assert_eq!(
        sleeping.verdict,
        Verdict::Unreliable(Unreliable::UnexpectedEnd(ENTRY.add(3)))
    );
}

#[test]
fn hostile_stacks_end() {
    // A return address that is not code, a stack pointer that does not move, one outside, and
    // one that goes down.
    let sp = TASK.add(0x100);
    let not_text = Guest::default().put(sp, Gva(0x1234));
    assert_eq!(
        walk_from(&not_text, TEXT.add(0x10), sp, false).verdict,
        Verdict::Unreliable(Unreliable::NotText(Gva(0x1234)))
    );
    let stuck = Guest::default().put(sp.sub(8), STUCK.add(1));
    assert_eq!(
        walk_from(&stuck, STUCK.add(1), sp, false).verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(sp))
    );
    assert_eq!(
        walk_from(&Guest::default(), TEXT.add(0x10), Gva(0x1000), false).verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(Gva(0x1000)))
    );
    let down =
        Guest::default()
            .put(sp, SYSCALL.add(1))
            .regs(sp.add(8), TEXT.add(1), 0x10, sp.sub(0x40));
    assert_eq!(
        walk_from(&down, TEXT.add(0x10), sp, false).verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(sp.sub(0x40)))
    );
    // The interrupt stack may be left, but not entered again.
    let saved = IRQ.add(SIZE).sub(8);
    let back = Guest::default()
        .put(saved, TOP.sub(0x208))
        .put(TOP.sub(0x208), SWITCHES_STACK.add(1))
        .put(TOP.sub(0x200), IRQ.add(0x100));
    assert!(matches!(
        walk_from(&back, SWITCHES_STACK.add(1), saved, true).verdict,
        Verdict::Unreliable(Unreliable::BadStackPointer(_))
    ));
}

#[test]
fn a_hundred_frames_are_too_many() {
    let mut guest = Guest::default();
    for frame in 0..200u64 {
        guest = guest.put(TASK.add(8 * frame), TEXT.add(0x10));
    }
    let stack = walk_from(&guest, TEXT.add(0x10), TASK, false);
    assert_eq!(stack.frames.len(), MAX_FRAMES);
    assert_eq!(
        stack.verdict,
        Verdict::Unreliable(Unreliable::TooDeep(MAX_FRAMES))
    );
}

#[test]
fn a_freed_module_is_not_unwound_with_its_old_data() {
    let module = Gva(0xffff_ffff_c000_0000);
    let fingerprint = Gva(0xffff_ffff_c000_4000);
    let mut code = map();
    code.add(CodeRegion {
        name: "module".into(),
        text: range(module, 0x100),
        orc: OrcTable::from_unsorted(vec![(module, CALL8)], OrcEncoding::Typed).unwrap(),
        fingerprint: vec![(fingerprint, 7)],
    })
    .unwrap();
    let sp = TOP.sub(0x100);
    let verdict = |guest: Guest| {
        let start = Cursor {
            ip: module.add(4),
            sp,
            bp: 0,
            exact: true,
            retp: None,
            regs: None,
        };
        let mut stacks = WalkMemory::new(&guest, &AREAS);
        let records = TracerRecords::default();
        let ret_addrs = RetAddrs::new(&records, &guest, OWNER, false);
        walk_stack(&code, &mut stacks, ret_addrs, start, Origin::default()).verdict
    };
    let present = || Guest::default().put(sp, KTHREAD_ENTRY.add(1));
    assert_eq!(
        verdict(present().put(fingerprint, Gva(7))),
        Verdict::Reliable
    );
    assert_eq!(
        verdict(present().put(fingerprint, Gva(8))),
        Verdict::Unreliable(Unreliable::NoOrc(module.add(4)))
    );
}

proptest! {
    #[test]
    fn a_walk_of_any_stack_is_bounded(
        words in prop::collection::vec((0u64..SIZE / 8, 0u64..0x10), 0..400),
        ip in 0u64..0x500,
        sp in 0u64..SIZE / 8,
        bp in any::<u64>(),
        exact in any::<bool>(),
    ) {
        // Words that look like code, like stack addresses, or like neither.
        let mut guest = Guest::default();
        for (at, kind) in words {
            let value = match kind {
                0..8 => TEXT.add(0x13 * at % 0x420),
                8..12 => TASK.add(8 * (at * 7 % (SIZE / 8))),
                12..14 => IRQ.add(8 * (at * 5 % (SIZE / 8))),
                _ => Gva(at * 0x1111),
            };
            guest = guest.put(TASK.add(8 * at), value);
        }
        let start = Cursor { ip: TEXT.add(ip), sp: TASK.add(8 * sp), bp, exact, retp: None, regs: None };
        let areas = [area(StackType::Task, TASK), area(StackType::Irq, IRQ)];
        let records = tests::graph(false);
        let stack = walk_stack(
            &map(),
            &mut WalkMemory::new(&guest, &areas),
            RetAddrs::new(&records, &guest, OWNER, false),
            start,
            Origin { running: exact, through_init: true },
        );
        prop_assert!(stack.frames.len() <= MAX_FRAMES);
    }
}
