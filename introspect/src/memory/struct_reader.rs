//! Reading several fields of one structure of the guest with few copies: [`StructReader`].
//!
//! A `task_struct` has some 10 KiB, and the fields of interest are in a few places: two or three
//! copies replace one read for each field. This module knows where fields are and nothing of what
//! they mean. A field that could not be copied ahead is read on its own, so that an error is that
//! of the requested field.

use std::cell::{Cell, Ref, RefCell};

use crate::addr::Gva;
use crate::memory::FieldRange;
use crate::memory::kernel::{Field, KernelMemory, ReadError};

/// Fields that are at most this many bytes apart are copied together: starting another read costs
/// more than copying the gap.
const GAP: usize = 256;
/// The same where the bytes between fields must not be copied: less than a cache line.
const EXACT_GAP: usize = 16;
/// No span is longer than this: offsets and sizes come from the guest.
const MAX_SPAN: usize = 4096;
/// Larger fields are not copied ahead.
const MAX_FIELD: u64 = 64;

/// A range of the structure, and where its copy is in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    len: usize,
    held_at: usize,
}

/// Reads structures of one type, one at a time: [`load`](Self::load) copies one, the readers return
/// fields of the copy.
pub(crate) struct StructReader<'a, 'm> {
    memory: &'a KernelMemory<'m>,
    spans: Vec<Span>,
    /// The same ranges, in the form that [`PhysMemory`](crate::PhysMemory) takes.
    ranges: Vec<FieldRange>,
    /// The address of the structure whose copy is held.
    base: Cell<Option<Gva>>,
    held: RefCell<Vec<u8>>,
}

impl<'a, 'm> StructReader<'a, 'm> {
    /// A reader that copies `fields`, and what is between near ones.
    pub(crate) fn new(
        memory: &'a KernelMemory<'m>,
        fields: impl IntoIterator<Item = Field>,
    ) -> Self {
        StructReader::of_spans(memory, spans(fields, GAP))
    }

    /// A reader that copies `fields` and little else.
    pub(crate) fn exact(
        memory: &'a KernelMemory<'m>,
        fields: impl IntoIterator<Item = Field>,
    ) -> Self {
        StructReader::of_spans(memory, spans(fields, EXACT_GAP))
    }

    fn of_spans(memory: &'a KernelMemory<'m>, spans: Vec<Span>) -> Self {
        let len = spans.last().map_or(0, |last| last.held_at + last.len);
        let range = |span: &Span| FieldRange {
            offset: span.offset,
            len: span.len,
        };
        StructReader {
            memory,
            ranges: spans.iter().map(range).collect(),
            spans,
            base: Cell::new(None),
            held: RefCell::new(vec![0; len]),
        }
    }

    /// Copies the structure at `base` as it is now. If it cannot be read, no structure is held.
    pub(crate) fn load(&self, base: Gva) {
        self.base.set(None);
        let mut held = self.held.borrow_mut();
        if self
            .memory
            .read_fields(base, &self.ranges, &mut held)
            .is_ok()
        {
            self.base.set(Some(base));
        }
    }

    /// Sets `same[n]` where [`load`](Self::load) of `bases[n]` would certainly copy the `n`th group
    /// of `bytes` ([`PhysMemory::compare`](crate::PhysMemory::compare)).
    pub(crate) fn compare(&self, bases: &[Gva], bytes: &[u8], same: &mut [bool]) {
        self.memory.compare(bases, &self.ranges, bytes, same);
    }

    /// The length of a copy, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.held.borrow().len()
    }

    /// The copy of the structure at `base`, if it is the one that is held.
    pub(crate) fn bytes(&self, base: Gva) -> Option<Ref<'_, [u8]>> {
        let held = Ref::map(self.held.borrow(), Vec::as_slice);
        (self.base.get() == Some(base)).then_some(held)
    }

    /// Fills `buf` from `gva` on: from the copy where it covers the range, otherwise from the
    /// guest.
    fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        let held = self.held.borrow();
        match self
            .copied_range(gva, buf.len())
            .and_then(|range| held.get(range))
        {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => self.memory.read(gva, buf)?,
        }
        Ok(())
    }

    /// The range of the buffer that is the copy of the `len` bytes at `gva`.
    fn copied_range(&self, gva: Gva, len: usize) -> Option<std::ops::Range<usize>> {
        let offset = gva.since(self.base.get()?);
        let after = self.spans.partition_point(|span| span.offset <= offset);
        let span = self.spans.get(after.checked_sub(1)?)?;
        let into = usize::try_from(offset - span.offset).ok()?;
        let start = span.held_at + into;
        (into.checked_add(len)? <= span.len).then_some(start..start + len)
    }

    fn array<const N: usize>(&self, gva: Gva) -> Result<[u8; N], ReadError> {
        let mut raw = [0; N];
        self.read(gva, &mut raw)?;
        Ok(raw)
    }

    /// As [`KernelMemory::u32`].
    pub(crate) fn u32(&self, gva: Gva) -> Result<u32, ReadError> {
        self.array(gva).map(u32::from_le_bytes)
    }

    /// As [`KernelMemory::i32`].
    pub(crate) fn i32(&self, gva: Gva) -> Result<i32, ReadError> {
        self.array(gva).map(i32::from_le_bytes)
    }

    /// As [`KernelMemory::pointer`].
    pub(crate) fn pointer(&self, gva: Gva) -> Result<Gva, ReadError> {
        self.array(gva).map(u64::from_le_bytes).map(Gva)
    }

    /// As [`KernelMemory::field`].
    pub(crate) fn field(&self, base: Gva, field: Field) -> Result<u64, ReadError> {
        let gva = field.of(base);
        match field.size {
            4 => self.u32(gva).map(u64::from),
            8 => self.pointer(gva).map(|pointer| pointer.0),
            _ => self.memory.field(base, field),
        }
    }

    /// As [`KernelMemory::cstr`], for `N` bytes at the most.
    pub(crate) fn cstr<const N: usize>(&self, gva: Gva) -> Result<String, ReadError> {
        let Ok(raw) = self.array::<N>(gva) else {
            // The string may end before readable memory does.
            return self.memory.cstr(gva, N);
        };
        let len = raw.iter().position(|&byte| byte == 0).unwrap_or(N);
        Ok(String::from_utf8_lossy(raw.get(..len).unwrap_or_default()).into_owned())
    }
}

/// The ranges to copy for these fields, ascending and without overlap. Fields that are at most
/// `gap` bytes apart share a range.
fn spans(fields: impl IntoIterator<Item = Field>, gap: usize) -> Vec<Span> {
    let mut fields: Vec<Field> = fields
        .into_iter()
        .filter(|field| {
            (1..=MAX_FIELD).contains(&field.size) && field.offset <= u64::from(u32::MAX)
        })
        .collect();
    fields.sort_by_key(|field| field.offset);
    let mut spans: Vec<Span> = Vec::new();
    for Field { offset, size } in fields {
        let size = usize::try_from(size).unwrap_or(0);
        let distance = |last: &Span| usize::try_from(offset - last.offset).unwrap_or(usize::MAX);
        let joined = spans.last_mut().filter(|last| {
            let start = distance(last);
            start <= last.len + gap && start + size <= MAX_SPAN
        });
        match joined {
            Some(last) => last.len = last.len.max(distance(last) + size),
            None => {
                let held_at = spans.last().map_or(0, |last| last.held_at + last.len);
                spans.push(Span {
                    offset,
                    len: size,
                    held_at,
                });
            }
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::paging::AddressSpace;
    use crate::testing::Ram;
    use vm_memory::GuestAddress;

    const fn field(offset: u64, size: u64) -> Field {
        Field { offset, size }
    }

    /// Virtual 0..0x2000 is mapped to physical 0x5000, each byte is its address modulo 251, and
    /// nothing is mapped after it.
    fn ram() -> Ram {
        let mut ram = Ram::new(0x8000);
        for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003)] {
            ram.u64(at, entry);
        }
        ram.u64(0x4000, 0x5003);
        ram.u64(0x4008, 0x6003);
        for at in 0..0x2000 {
            ram.put(0x5000 + at, &[(at % 251) as u8]);
        }
        ram
    }

    fn memory(ram: &Ram) -> KernelMemory<'_> {
        let root = GuestAddress(0x1000);
        KernelMemory::new(ram, AddressSpace { root, levels: 4 })
    }

    const FIELDS: [Field; 6] = [
        field(0x700, 8),
        field(0, 4),
        field(4, 8),
        field(0x704, 4),
        field(0x80, 16),
        field(0x6ff, 1),
    ];

    #[test]
    fn near_fields_are_copied_together() {
        let span = |offset, len, held_at| Span {
            offset,
            len,
            held_at,
        };
        assert_eq!(spans(FIELDS, GAP), [span(0, 0x90, 0), span(0x6ff, 9, 0x90)]);
        let absurd = [field(0, 4096), field(u64::MAX, 8), field(8, 0)];
        assert_eq!(spans(absurd, GAP), []);
        let far = (0..100).map(|n| field(n * 200, 8));
        assert!(spans(far, GAP).iter().all(|span| span.len <= MAX_SPAN));
    }

    #[test]
    fn held_or_not_the_same_values_are_returned() {
        let ram = ram();
        let memory = memory(&ram);
        let reader = StructReader::new(&memory, FIELDS);
        // At the last bases, some or all fields are not mapped.
        for base in [0, 0x123, 0x1001, 0x18fc, 0x1ff0, 0x9000].map(Gva) {
            reader.load(base);
            for of in [base, Gva(0x321)] {
                for offset in (0..0x90).chain(0x6f0..0x720) {
                    let at = of.add(offset);
                    assert_eq!(reader.u32(at), memory.u32(at));
                    assert_eq!(reader.i32(at), memory.i32(at));
                    assert_eq!(reader.pointer(at), memory.pointer(at));
                    assert_eq!(reader.cstr::<15>(at), memory.cstr(at, 15));
                    for size in 1..10 {
                        let field = field(offset, size);
                        assert_eq!(reader.field(of, field), memory.field(of, field));
                    }
                }
            }
        }
    }
}
