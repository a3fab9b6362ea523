//! A map with every class of code, and regions that are added and removed.

use super::*;
use crate::unwind::orc::{OrcEncoding, RawOrcEntry};

pub(crate) const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
const INIT: Gva = Gva(0xffff_ffff_8200_0000);
const MODULE: Gva = Gva(0xffff_ffff_c000_0000);
pub(crate) const CALL8: RawOrcEntry = [8, 0, 0, 0, 5, 2];
pub(crate) const END: RawOrcEntry = [0, 0, 0, 0, 0, 1];
const HOLE: RawOrcEntry = [0; 6];

pub(crate) fn range(start: Gva, len: u64) -> GvaRange {
    GvaRange::new(start, start.add(len))
}

/// Ordinary code at +0, a hole at +0x100, ENDs at +0x200 (kernel thread), +0x300 (entry) and
/// +0x400 (ordinary code), then init text.
pub(crate) fn core() -> CoreText {
    let orc = OrcTable::from_unsorted(
        vec![
            (TEXT, CALL8),
            (TEXT.add(0x100), HOLE),
            (TEXT.add(0x200), END),
            (TEXT.add(0x500), CALL8),
            (INIT, CALL8),
        ],
        OrcEncoding::Typed,
    )
    .unwrap();
    CoreText {
        text: range(TEXT, 0x1000),
        init: range(INIT, 0x1000),
        orc,
        special: vec![
            (range(TEXT.add(0x700), 0x10), CodeClass::Transient),
            (range(TEXT.add(0x200), 0x100), CodeClass::TaskEntry),
            (range(TEXT.add(0x300), 0x100), CodeClass::UserEntry),
            (range(TEXT.add(0x600), 0x10), CodeClass::Traced),
        ],
    }
}

#[test]
fn ordinary_code_has_an_orc_entry_and_holes_do_not() {
    let map = CodeMap::new(core());
    assert!(matches!(
        map.action_at(TEXT, true, false),
        Ok(UnwindAction::Orc(_))
    ));
    let hole = TEXT.add(0x100);
    assert_eq!(
        map.action_at(hole, true, false),
        Err(Unreliable::NoOrc(hole))
    );
    // The return address of a call that ends its function is after the function: the call
    // counts.
    assert!(matches!(
        map.action_at(hole, false, false),
        Ok(UnwindAction::Orc(_))
    ));
    assert_eq!(
        map.action_at(TEXT, false, false),
        Err(Unreliable::NotText(TEXT))
    );
    assert_eq!(
        map.action_at(Gva(0), true, false),
        Err(Unreliable::NotText(Gva(0)))
    );
}

#[test]
fn an_end_is_accepted_only_where_stacks_end() {
    let map = CodeMap::new(core());
    let end = |at, exact| map.action_at(TEXT.add(at), exact, false);
    assert_eq!(end(0x210, false), Ok(UnwindAction::TaskEntry));
    assert_eq!(end(0x210, true), Ok(UnwindAction::TaskEntry));
    assert_eq!(end(0x310, true), Ok(UnwindAction::UserEntry));
    assert_eq!(
        end(0x310, false),
        Err(Unreliable::UnexpectedEnd(TEXT.add(0x310)))
    );
    assert_eq!(
        end(0x410, true),
        Err(Unreliable::UnexpectedEnd(TEXT.add(0x410)))
    );
}

#[test]
fn a_return_address_is_replaced_by_the_first_byte_of_a_trampoline_only() {
    let map = CodeMap::new(core());
    let at = TEXT.add(0x600);
    assert_eq!(map.action_at(at, false, false), Err(Unreliable::Traced(at)));
    for (at, exact) in [(0x600, true), (0x608, true), (0x608, false), (0x610, false)] {
        let ip = TEXT.add(at);
        let inside = Err(Unreliable::TransientCode(ip));
        assert_eq!(map.action_at(ip, exact, false), inside);
    }
}

#[test]
fn init_text_counts_only_for_a_task_that_came_through_it() {
    let map = CodeMap::new(core());
    let ip = INIT.add(5);
    assert!(matches!(
        map.action_at(ip, false, true),
        Ok(UnwindAction::Orc(_))
    ));
    assert_eq!(
        map.action_at(ip, false, false),
        Err(Unreliable::NotText(ip))
    );
}

#[test]
fn regions_have_precedence_over_the_core_and_never_overlap() {
    let mut map = CodeMap::new(core());
    let patch = |at: Gva, len| CodeRegion {
        name: format!("patch at {at}"),
        text: range(at, len),
        orc: OrcTable::from_unsorted(vec![(at, CALL8), (at.add(len), HOLE)], OrcEncoding::Typed)
            .unwrap(),
        fingerprint: Vec::new(),
    };
    let hole = TEXT.add(0x140);
    let id = map.add(patch(hole, 0x20)).unwrap();
    map.add(patch(MODULE, 0x100)).unwrap();
    assert!(matches!(
        map.action_at(hole, true, false),
        Ok(UnwindAction::Orc(_))
    ));
    assert!(map.action_at(hole.add(0x20), true, false).is_err());
    assert!(map.add(patch(hole.add(0x10), 0x20)).is_err());
    assert!(map.add(patch(hole.sub(0x10), 0x11)).is_err());
    assert!(map.add(patch(hole.sub(0x10), 0x10)).is_ok());
    map.remove(id);
    assert_eq!(
        map.action_at(hole, true, false),
        Err(Unreliable::NoOrc(hole))
    );
    assert!(matches!(
        map.action_at(MODULE, true, false),
        Ok(UnwindAction::Orc(_))
    ));
}

#[test]
fn no_stack_ends_in_a_module() {
    let mut map = CodeMap::new(core());
    map.add(CodeRegion {
        name: "module".into(),
        text: range(MODULE, 0x100),
        orc: OrcTable::from_unsorted(vec![(MODULE, END)], OrcEncoding::Typed).unwrap(),
        fingerprint: Vec::new(),
    })
    .unwrap();
    assert_eq!(
        map.action_at(MODULE, true, false),
        Err(Unreliable::UnexpectedEnd(MODULE))
    );
}

#[test]
fn transient_code_of_the_kernel_and_of_the_caller_is_refused() {
    let mut map = CodeMap::new(core());
    let ip = TEXT.add(0x705);
    assert_eq!(
        map.action_at(ip, true, false),
        Err(Unreliable::TransientCode(ip))
    );
    let stub = range(TEXT.add(0x20), 0x10);
    map.add_transient(stub);
    map.add_transient(range(TEXT.add(0x24), 0x4));
    for at in [0x20, 0x2f] {
        let ip = TEXT.add(at);
        assert_eq!(
            map.action_at(ip, true, false),
            Err(Unreliable::TransientCode(ip))
        );
    }
    assert!(map.action_at(TEXT.add(0x30), true, false).is_ok());
    map.remove_transient(stub);
    assert!(map.action_at(TEXT.add(0x2f), true, false).is_ok());
}
