//! ORC entries: three encodings with one meaning.
//!
//! An ORC entry says, for a run of instructions, where the caller's frame is. Linux has packed the
//! same six bytes in three ways; the encoding that a guest uses is found from its table
//! ([`detect`]), never from its version. This module knows bits and their meaning; it must not know
//! addresses, symbols or stacks.
//!
//! This module follows `arch/x86/include/asm/orc_types.h` as of 5.10/6.1, 6.12 and 7.3.

/// The six bytes of a `struct orc_entry`.
pub type RawOrcEntry = [u8; ENTRY_SIZE];

/// `sizeof(struct orc_entry)`, the same in every encoding.
pub(crate) const ENTRY_SIZE: usize = 6;

/// The base that an offset is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrcBase {
    /// No base: for the stack pointer, there is no caller; for the frame pointer, it is unchanged.
    Undefined,
    /// The stack pointer.
    Sp,
    /// The frame pointer.
    Bp,
    /// The caller's stack pointer, which was found first.
    PrevSp,
    /// The value in memory at the stack pointer; the offset is added after the load.
    SpIndirect,
    /// The value in memory at the frame pointer plus the offset.
    BpIndirect,
    /// `rax`, in a frame with all registers.
    Ax,
    /// `rdx`, in a frame with all registers.
    Dx,
    /// `rdi`, in a frame with all registers.
    Di,
    /// `r10`, in a frame with all registers.
    R10,
    /// `r13`, in a frame with all registers.
    R13,
}

/// What is stored at the caller's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrcKind {
    /// Unknown: the unwinder cannot continue.
    Undefined,
    /// Nothing: according to the kernel, stacks end here.
    End,
    /// A return address, just below the frame.
    Call,
    /// A complete `pt_regs`.
    Regs,
    /// Only what the processor pushed: ip, cs, flags, sp and ss.
    PartialRegs,
}

/// One decoded entry, independent of the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrcEntry {
    /// What is stored at the caller's frame.
    pub kind: OrcKind,
    /// The base from which the caller's frame is found.
    pub sp_base: OrcBase,
    /// The offset added to `sp_base`, in bytes.
    pub sp_offset: i16,
    /// The base from which the caller's frame pointer is found: `Undefined`, `PrevSp` or `Bp`.
    pub bp_base: OrcBase,
    /// The offset added to `bp_base`, in bytes.
    pub bp_offset: i16,
    /// Whether the caller's ip is an exact position, not a return address.
    pub signal: bool,
}

impl OrcEntry {
    /// The entry for code of which nothing is known.
    pub const UNDEFINED: OrcEntry = OrcEntry {
        kind: OrcKind::Undefined,
        sp_base: OrcBase::Undefined,
        sp_offset: 0,
        bp_base: OrcBase::Undefined,
        bp_offset: 0,
        signal: false,
    };

    /// Whether the entry is the one of the first instruction of an ordinary function: only the
    /// return address is pushed.
    #[must_use]
    pub fn is_function_entry(&self) -> bool {
        self.kind == OrcKind::Call && self.sp_base == OrcBase::Sp && self.sp_offset == 8
    }
}

/// How a kernel packs its ORC entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrcEncoding {
    /// Two bits of type and an `end` bit; without an sp register and `end`, the entry is undefined
    /// (5.10, 6.1).
    EndBit,
    /// Three bits of type and a `signal` bit (6.4 and later).
    Typed,
    /// As `Typed`, with other numbers for the registers (7.x).
    TypedRenumbered,
}

impl OrcEncoding {
    /// All known encodings.
    pub const ALL: [OrcEncoding; 3] = [
        OrcEncoding::EndBit,
        OrcEncoding::Typed,
        OrcEncoding::TypedRenumbered,
    ];

    /// Decodes `raw`; `None` when no kernel with this encoding writes such an entry.
    #[must_use]
    pub fn decode(self, raw: RawOrcEntry) -> Option<OrcEntry> {
        let [sp0, sp1, bp0, bp1, regs, rest] = raw;
        let sp_base = self.base(regs & 0xf)?;
        let bp_base = self.base(regs >> 4)?;
        if !matches!(bp_base, OrcBase::Undefined | OrcBase::PrevSp | OrcBase::Bp)
            || sp_base == OrcBase::PrevSp
        {
            return None;
        }
        let (kind, signal) = match self {
            OrcEncoding::EndBit => decode_end_bit(rest, sp_base)?,
            OrcEncoding::Typed | OrcEncoding::TypedRenumbered => decode_typed(rest, sp_base)?,
        };
        Some(OrcEntry {
            kind,
            sp_base,
            sp_offset: i16::from_le_bytes([sp0, sp1]),
            bp_base,
            bp_offset: i16::from_le_bytes([bp0, bp1]),
            signal,
        })
    }

    fn base(self, number: u8) -> Option<OrcBase> {
        Some(match (self, number) {
            (_, 0) => OrcBase::Undefined,
            (_, 4) => OrcBase::Bp,
            (_, 6) => OrcBase::R10,
            (_, 7) => OrcBase::R13,
            (_, 2) => OrcBase::Dx,
            (OrcEncoding::TypedRenumbered, 1) => OrcBase::Ax,
            (OrcEncoding::TypedRenumbered, 3) => OrcBase::Sp,
            (OrcEncoding::TypedRenumbered, 5) => OrcBase::Di,
            (OrcEncoding::TypedRenumbered, 8) => OrcBase::PrevSp,
            (OrcEncoding::TypedRenumbered, 9) => OrcBase::SpIndirect,
            (OrcEncoding::TypedRenumbered, 10) => OrcBase::BpIndirect,
            (_, 1) => OrcBase::PrevSp,
            (_, 3) => OrcBase::Di,
            (_, 5) => OrcBase::Sp,
            (_, 8) => OrcBase::BpIndirect,
            (_, 9) => OrcBase::SpIndirect,
            _ => return None,
        })
    }
}

/// Decodes `type:2, end:1`; the caller's position is exact after registers.
fn decode_end_bit(rest: u8, sp_base: OrcBase) -> Option<(OrcKind, bool)> {
    let end = rest & 0b100 != 0;
    if rest & !0b111 != 0 || (end && sp_base != OrcBase::Undefined) {
        return None;
    }
    Some(match (sp_base, rest & 0b11) {
        (OrcBase::Undefined, _) if end => (OrcKind::End, false),
        (OrcBase::Undefined, _) => (OrcKind::Undefined, false),
        (_, 0) => (OrcKind::Call, false),
        (_, 1) => (OrcKind::Regs, true),
        (_, 2) => (OrcKind::PartialRegs, true),
        // 5.10 has a fourth type, for return trampolines, which none of its code uses any more.
        _ => (OrcKind::Undefined, false),
    })
}

/// Decodes `type:3, signal:1`.
fn decode_typed(rest: u8, sp_base: OrcBase) -> Option<(OrcKind, bool)> {
    if rest & !0b1111 != 0 {
        return None;
    }
    let kind = match rest & 0b111 {
        0 => OrcKind::Undefined,
        1 => OrcKind::End,
        2 => OrcKind::Call,
        3 => OrcKind::Regs,
        4 => OrcKind::PartialRegs,
        _ => return None,
    };
    let has_base = sp_base != OrcBase::Undefined;
    if has_base == matches!(kind, OrcKind::Undefined | OrcKind::End) {
        return None;
    }
    Some((kind, rest & 0b1000 != 0))
}

/// Detects the encoding of a kernel's own table from its entries.
///
/// The right one decodes every entry, and most entries are calls found from the stack pointer.
/// `None` when no encoding does, or more than one.
#[must_use]
pub fn detect(entries: &[RawOrcEntry]) -> Option<OrcEncoding> {
    let mut matching = OrcEncoding::ALL
        .into_iter()
        .filter(|e| matches_all(*e, entries));
    let found = matching.next()?;
    matching.next().is_none().then_some(found)
}

fn matches_all(encoding: OrcEncoding, entries: &[RawOrcEntry]) -> bool {
    let mut calls_from_sp = 0usize;
    for raw in entries {
        let Some(entry) = encoding.decode(*raw) else {
            return false;
        };
        if entry.kind == OrcKind::Call && entry.sp_base == OrcBase::Sp {
            calls_from_sp += 1;
        }
    }
    calls_from_sp > entries.len() / 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(sp: i16, bp: i16, sp_reg: u8, bp_reg: u8, rest: u8) -> RawOrcEntry {
        let [a, b] = sp.to_le_bytes();
        let [c, d] = bp.to_le_bytes();
        [a, b, c, d, sp_reg | bp_reg << 4, rest]
    }

    #[test]
    fn the_same_call_in_each_encoding() {
        let call = OrcEntry {
            kind: OrcKind::Call,
            sp_base: OrcBase::Sp,
            sp_offset: 24,
            bp_base: OrcBase::PrevSp,
            bp_offset: -16,
            signal: false,
        };
        assert_eq!(
            OrcEncoding::EndBit.decode(raw(24, -16, 5, 1, 0)),
            Some(call)
        );
        assert_eq!(OrcEncoding::Typed.decode(raw(24, -16, 5, 1, 2)), Some(call));
        assert_eq!(
            OrcEncoding::TypedRenumbered.decode(raw(24, -16, 3, 8, 2)),
            Some(call)
        );
    }

    #[test]
    fn registers_make_the_next_frame_exact() {
        let old = OrcEncoding::EndBit.decode(raw(0, 0, 5, 0, 1)).unwrap();
        assert_eq!((old.kind, old.signal), (OrcKind::Regs, true));
        let old = OrcEncoding::EndBit.decode(raw(8, 0, 5, 0, 2)).unwrap();
        assert_eq!((old.kind, old.signal), (OrcKind::PartialRegs, true));
        let new = OrcEncoding::Typed.decode(raw(0, 0, 5, 0, 3 | 8)).unwrap();
        assert_eq!((new.kind, new.signal), (OrcKind::Regs, true));
    }

    #[test]
    fn end_and_undefined_entries() {
        let kind = |e: OrcEncoding, r| e.decode(r).map(|e| e.kind);
        assert_eq!(
            kind(OrcEncoding::EndBit, raw(0, 0, 0, 0, 4)),
            Some(OrcKind::End)
        );
        assert_eq!(
            kind(OrcEncoding::EndBit, raw(0, 0, 0, 0, 0)),
            Some(OrcKind::Undefined)
        );
        assert_eq!(
            kind(OrcEncoding::Typed, raw(0, 0, 0, 0, 1)),
            Some(OrcKind::End)
        );
        assert_eq!(
            kind(OrcEncoding::Typed, raw(0, 0, 0, 0, 0)),
            Some(OrcKind::Undefined)
        );
    }

    #[test]
    fn entries_that_no_kernel_writes_are_refused() {
        // END with a base; undefined with a base; a call without one; unused bits; unknown
        // registers.
        assert_eq!(OrcEncoding::EndBit.decode(raw(8, 0, 5, 0, 4)), None);
        assert_eq!(OrcEncoding::Typed.decode(raw(8, 0, 5, 0, 0)), None);
        assert_eq!(OrcEncoding::Typed.decode(raw(8, 0, 0, 0, 2)), None);
        assert_eq!(OrcEncoding::Typed.decode(raw(8, 0, 5, 0, 0x12)), None);
        assert_eq!(OrcEncoding::Typed.decode(raw(8, 0, 11, 0, 2)), None);
        assert_eq!(
            OrcEncoding::TypedRenumbered.decode(raw(8, 0, 3, 10, 2)),
            None
        );
    }

    #[test]
    fn detection_by_majority_and_by_total_decoding() {
        let table = |sp: u8, prev: u8, call: u8, end: u8| {
            vec![
                raw(8, 0, sp, 0, call),
                raw(16, -16, sp, prev, call),
                raw(16, -16, 4, prev, call),
                raw(24, 0, sp, 0, call),
                raw(0, 0, 0, 0, end),
            ]
        };
        assert_eq!(detect(&table(5, 1, 0, 4)), Some(OrcEncoding::EndBit));
        assert_eq!(detect(&table(5, 1, 2, 1)), Some(OrcEncoding::Typed));
        assert_eq!(
            detect(&table(3, 8, 2, 1)),
            Some(OrcEncoding::TypedRenumbered)
        );
        assert_eq!(detect(&[[0xff; 6]; 4]), None);
        assert_eq!(detect(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(raw in any::<[u8; 6]>()) {
            for encoding in OrcEncoding::ALL {
                if let Some(entry) = encoding.decode(raw) {
                    let is_bp_base =
                        matches!(entry.bp_base, OrcBase::Undefined | OrcBase::PrevSp | OrcBase::Bp);
                    prop_assert!(is_bp_base);
                }
            }
        }
    }
}
