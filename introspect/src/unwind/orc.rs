//! ORC entries: three encodings with one meaning.
//!
//! An ORC entry says, for a run of instructions, where the caller's frame is. Linux has packed the
//! same six bytes in three ways; the encoding that a guest uses is found from its table
//! ([`detect`]), never from its version. Knows bits and their meaning; must not know addresses,
//! symbols or stacks.
//!
//! Follows `arch/x86/include/asm/orc_types.h` as of 5.10/6.1, 6.12 and 7.3.

/// The six bytes of a `struct orc_entry`.
pub type RawEntry = [u8; ENTRY_SIZE];

/// `sizeof(struct orc_entry)`, the same in every encoding.
pub const ENTRY_SIZE: usize = 6;

/// The base that an offset is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
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
pub enum Kind {
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
pub struct Entry {
    /// What is stored at the caller's frame.
    pub kind: Kind,
    /// The base from which the caller's frame is found.
    pub sp_base: Base,
    /// The offset added to `sp_base`, in bytes.
    pub sp_offset: i16,
    /// The base from which the caller's frame pointer is found: `Undefined`, `PrevSp` or `Bp`.
    pub bp_base: Base,
    /// The offset added to `bp_base`, in bytes.
    pub bp_offset: i16,
    /// Whether the caller's ip is an exact position, not a return address.
    pub signal: bool,
}

impl Entry {
    /// The entry for code of which nothing is known.
    pub const UNDEFINED: Entry = Entry {
        kind: Kind::Undefined,
        sp_base: Base::Undefined,
        sp_offset: 0,
        bp_base: Base::Undefined,
        bp_offset: 0,
        signal: false,
    };

    /// Whether the entry is the one of the first instruction of an ordinary function: only the
    /// return address is pushed.
    #[must_use]
    pub fn is_function_entry(&self) -> bool {
        self.kind == Kind::Call && self.sp_base == Base::Sp && self.sp_offset == 8
    }
}

/// How a kernel packs its ORC entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Two bits of type and an `end` bit; without an sp register and `end`, the entry is undefined
    /// (5.10, 6.1).
    EndBit,
    /// Three bits of type and a `signal` bit (6.4 and later).
    Typed,
    /// As `Typed`, with other numbers for the registers (7.x).
    TypedRenumbered,
}

impl Encoding {
    /// All known encodings.
    pub const ALL: [Encoding; 3] = [Encoding::EndBit, Encoding::Typed, Encoding::TypedRenumbered];

    /// Decodes `raw`; `None` when no kernel with this encoding writes such an entry.
    #[must_use]
    pub fn decode(self, raw: RawEntry) -> Option<Entry> {
        let [sp0, sp1, bp0, bp1, regs, rest] = raw;
        let sp_base = self.base(regs & 0xf)?;
        let bp_base = self.base(regs >> 4)?;
        if !matches!(bp_base, Base::Undefined | Base::PrevSp | Base::Bp) || sp_base == Base::PrevSp
        {
            return None;
        }
        let (kind, signal) = match self {
            Encoding::EndBit => decode_end_bit(rest, sp_base)?,
            Encoding::Typed | Encoding::TypedRenumbered => decode_typed(rest, sp_base)?,
        };
        Some(Entry {
            kind,
            sp_base,
            sp_offset: i16::from_le_bytes([sp0, sp1]),
            bp_base,
            bp_offset: i16::from_le_bytes([bp0, bp1]),
            signal,
        })
    }

    fn base(self, number: u8) -> Option<Base> {
        Some(match (self, number) {
            (_, 0) => Base::Undefined,
            (_, 4) => Base::Bp,
            (_, 6) => Base::R10,
            (_, 7) => Base::R13,
            (_, 2) => Base::Dx,
            (Encoding::TypedRenumbered, 1) => Base::Ax,
            (Encoding::TypedRenumbered, 3) => Base::Sp,
            (Encoding::TypedRenumbered, 5) => Base::Di,
            (Encoding::TypedRenumbered, 8) => Base::PrevSp,
            (Encoding::TypedRenumbered, 9) => Base::SpIndirect,
            (Encoding::TypedRenumbered, 10) => Base::BpIndirect,
            (_, 1) => Base::PrevSp,
            (_, 3) => Base::Di,
            (_, 5) => Base::Sp,
            (_, 8) => Base::BpIndirect,
            (_, 9) => Base::SpIndirect,
            _ => return None,
        })
    }
}

/// Decodes `type:2, end:1`; the caller's position is exact after registers.
fn decode_end_bit(rest: u8, sp_base: Base) -> Option<(Kind, bool)> {
    let end = rest & 0b100 != 0;
    if rest & !0b111 != 0 || (end && sp_base != Base::Undefined) {
        return None;
    }
    Some(match (sp_base, rest & 0b11) {
        (Base::Undefined, _) if end => (Kind::End, false),
        (Base::Undefined, _) => (Kind::Undefined, false),
        (_, 0) => (Kind::Call, false),
        (_, 1) => (Kind::Regs, true),
        (_, 2) => (Kind::PartialRegs, true),
        // 5.10 has a fourth type, for return trampolines, which none of its code uses any more.
        _ => (Kind::Undefined, false),
    })
}

/// Decodes `type:3, signal:1`.
fn decode_typed(rest: u8, sp_base: Base) -> Option<(Kind, bool)> {
    if rest & !0b1111 != 0 {
        return None;
    }
    let kind = match rest & 0b111 {
        0 => Kind::Undefined,
        1 => Kind::End,
        2 => Kind::Call,
        3 => Kind::Regs,
        4 => Kind::PartialRegs,
        _ => return None,
    };
    let has_base = sp_base != Base::Undefined;
    if has_base == matches!(kind, Kind::Undefined | Kind::End) {
        return None;
    }
    Some((kind, rest & 0b1000 != 0))
}

/// Detects the encoding of a kernel's own table from its entries.
///
/// The right one decodes every entry, and most entries are calls found from the stack pointer.
/// `None` when no encoding does, or more than one.
#[must_use]
pub fn detect(entries: &[RawEntry]) -> Option<Encoding> {
    let mut matching = Encoding::ALL
        .into_iter()
        .filter(|e| matches_all(*e, entries));
    let found = matching.next()?;
    matching.next().is_none().then_some(found)
}

fn matches_all(encoding: Encoding, entries: &[RawEntry]) -> bool {
    let mut calls_from_sp = 0usize;
    for raw in entries {
        let Some(entry) = encoding.decode(*raw) else {
            return false;
        };
        if entry.kind == Kind::Call && entry.sp_base == Base::Sp {
            calls_from_sp += 1;
        }
    }
    calls_from_sp > entries.len() / 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(sp: i16, bp: i16, sp_reg: u8, bp_reg: u8, rest: u8) -> RawEntry {
        let [a, b] = sp.to_le_bytes();
        let [c, d] = bp.to_le_bytes();
        [a, b, c, d, sp_reg | bp_reg << 4, rest]
    }

    #[test]
    fn the_same_call_in_each_encoding() {
        let call = Entry {
            kind: Kind::Call,
            sp_base: Base::Sp,
            sp_offset: 24,
            bp_base: Base::PrevSp,
            bp_offset: -16,
            signal: false,
        };
        assert_eq!(Encoding::EndBit.decode(raw(24, -16, 5, 1, 0)), Some(call));
        assert_eq!(Encoding::Typed.decode(raw(24, -16, 5, 1, 2)), Some(call));
        assert_eq!(
            Encoding::TypedRenumbered.decode(raw(24, -16, 3, 8, 2)),
            Some(call)
        );
    }

    #[test]
    fn registers_make_the_next_frame_exact() {
        let old = Encoding::EndBit.decode(raw(0, 0, 5, 0, 1)).unwrap();
        assert_eq!((old.kind, old.signal), (Kind::Regs, true));
        let old = Encoding::EndBit.decode(raw(8, 0, 5, 0, 2)).unwrap();
        assert_eq!((old.kind, old.signal), (Kind::PartialRegs, true));
        let new = Encoding::Typed.decode(raw(0, 0, 5, 0, 3 | 8)).unwrap();
        assert_eq!((new.kind, new.signal), (Kind::Regs, true));
    }

    #[test]
    fn end_and_undefined_entries() {
        let kind = |e: Encoding, r| e.decode(r).map(|e| e.kind);
        assert_eq!(kind(Encoding::EndBit, raw(0, 0, 0, 0, 4)), Some(Kind::End));
        assert_eq!(
            kind(Encoding::EndBit, raw(0, 0, 0, 0, 0)),
            Some(Kind::Undefined)
        );
        assert_eq!(kind(Encoding::Typed, raw(0, 0, 0, 0, 1)), Some(Kind::End));
        assert_eq!(
            kind(Encoding::Typed, raw(0, 0, 0, 0, 0)),
            Some(Kind::Undefined)
        );
    }

    #[test]
    fn entries_that_no_kernel_writes_are_refused() {
        // END with a base; undefined with a base; a call without one; unused bits; unknown
        // registers.
        assert_eq!(Encoding::EndBit.decode(raw(8, 0, 5, 0, 4)), None);
        assert_eq!(Encoding::Typed.decode(raw(8, 0, 5, 0, 0)), None);
        assert_eq!(Encoding::Typed.decode(raw(8, 0, 0, 0, 2)), None);
        assert_eq!(Encoding::Typed.decode(raw(8, 0, 5, 0, 0x12)), None);
        assert_eq!(Encoding::Typed.decode(raw(8, 0, 11, 0, 2)), None);
        assert_eq!(Encoding::TypedRenumbered.decode(raw(8, 0, 3, 10, 2)), None);
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
        assert_eq!(detect(&table(5, 1, 0, 4)), Some(Encoding::EndBit));
        assert_eq!(detect(&table(5, 1, 2, 1)), Some(Encoding::Typed));
        assert_eq!(detect(&table(3, 8, 2, 1)), Some(Encoding::TypedRenumbered));
        assert_eq!(detect(&[[0xff; 6]; 4]), None);
        assert_eq!(detect(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(raw in any::<[u8; 6]>()) {
            for encoding in Encoding::ALL {
                if let Some(entry) = encoding.decode(raw) {
                    let is_bp_base =
                        matches!(entry.bp_base, Base::Undefined | Base::PrevSp | Base::Bp);
                    prop_assert!(is_bp_base);
                }
            }
        }
    }
}
