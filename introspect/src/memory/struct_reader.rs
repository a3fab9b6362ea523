//! One structure of the guest at a time, its fields read together.
//!
//! A `task_struct` has some 10 KiB, and what is wanted of it lies in a few places: two or three copies instead of a read for each
//! field. Knows where fields lie and nothing of what they mean. What could not be read together is read one by one, so that
//! an error is the one of the field that was asked for.

use std::cell::{Cell, Ref, RefCell};

use crate::addr::Gva;
use crate::memory::FieldRange;
use crate::memory::kernel::{Field, KernelMemory, ReadError};

/// Fields that lie no further apart are copied together: to begin another read costs more than so many bytes.
const GAP: usize = 256;
/// The same where what lies between is to be left out: less than the next cache line.
const NEAR: usize = 16;
/// No span is longer: offsets and sizes are the guest's word.
const LONGEST: usize = 4096;
/// No field of more bytes is read ahead.
const MAX_FIELD: u64 = 64;

/// Some bytes of the structure, and where they are in what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    len: usize,
    held_at: usize,
}

/// Reads structures of one type, one at a time.
pub(crate) struct StructReader<'a, 'm> {
    memory: &'a KernelMemory<'m>,
    spans: Vec<Span>,
    /// The same, for who reads them.
    parts: Vec<FieldRange>,
    /// The structure that is held.
    base: Cell<Option<Gva>>,
    held: RefCell<Vec<u8>>,
}

impl<'a, 'm> StructReader<'a, 'm> {
    /// A reader that reads `fields` ahead, and what lies between near ones with them.
    pub(crate) fn new(
        memory: &'a KernelMemory<'m>,
        fields: impl IntoIterator<Item = Field>,
    ) -> Self {
        StructReader::of_spans(memory, spans(fields, GAP))
    }

    /// A reader that reads `fields` ahead and little else.
    pub(crate) fn exact(
        memory: &'a KernelMemory<'m>,
        fields: impl IntoIterator<Item = Field>,
    ) -> Self {
        StructReader::of_spans(memory, spans(fields, NEAR))
    }

    fn of_spans(memory: &'a KernelMemory<'m>, spans: Vec<Span>) -> Self {
        let len = spans.last().map_or(0, |last| last.held_at + last.len);
        let part = |span: &Span| FieldRange {
            offset: span.offset,
            len: span.len,
        };
        StructReader {
            memory,
            parts: spans.iter().map(part).collect(),
            spans,
            base: Cell::new(None),
            held: RefCell::new(vec![0; len]),
        }
    }

    /// Takes the structure at `base` as it is now, if it can be read; nothing is held if not.
    pub(crate) fn load(&self, base: Gva) {
        self.base.set(None);
        let mut held = self.held.borrow_mut();
        if self.memory.gather(base, &self.parts, &mut held).is_ok() {
            self.base.set(Some(base));
        }
    }

    /// Sets `same` for structures at `bases` of which [`load`](Self::load) would certainly hold just the bytes that stand for them.
    pub(crate) fn compare(&self, bases: &[Gva], bytes: &[u8], same: &mut [bool]) {
        self.memory.compare(bases, &self.parts, bytes, same);
    }

    /// Bytes of a structure, as they are held.
    pub(crate) fn len(&self) -> usize {
        self.held.borrow().len()
    }

    /// What is held of the structure at `base`, if it is held.
    pub(crate) fn bytes(&self, base: Gva) -> Option<Ref<'_, [u8]>> {
        let held = Ref::map(self.held.borrow(), Vec::as_slice);
        (self.base.get() == Some(base)).then_some(held)
    }

    /// Fills `buf` from `gva` on: from what is held where it is there.
    fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        let held = self.held.borrow();
        match self.place(gva, buf.len()).and_then(|place| held.get(place)) {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => self.memory.read(gva, buf)?,
        }
        Ok(())
    }

    /// Where in what is held the `len` bytes at `gva` are.
    fn place(&self, gva: Gva, len: usize) -> Option<std::ops::Range<usize>> {
        let offset = gva.since(self.base.get()?);
        let behind = self.spans.partition_point(|span| span.offset <= offset);
        let span = self.spans.get(behind.checked_sub(1)?)?;
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
            // It may end before memory does.
            return self.memory.cstr(gva, N);
        };
        let len = raw.iter().position(|&byte| byte == 0).unwrap_or(N);
        Ok(String::from_utf8_lossy(raw.get(..len).unwrap_or_default()).into_owned())
    }
}

/// What to copy for these fields: rising, without overlap. Those that lie no further apart than `gap` are copied together.
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
            start <= last.len + gap && start + size <= LONGEST
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

    /// Virtual 0..0x2000 is mapped, each byte to itself plus 0x5000; nothing is behind it.
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
    fn near_fields_are_read_together() {
        let span = |offset, len, held_at| Span {
            offset,
            len,
            held_at,
        };
        assert_eq!(spans(FIELDS, GAP), [span(0, 0x90, 0), span(0x6ff, 9, 0x90)]);
        let absurd = [field(0, 4096), field(u64::MAX, 8), field(8, 0)];
        assert_eq!(spans(absurd, GAP), []);
        let far = (0..100).map(|n| field(n * 200, 8));
        assert!(spans(far, GAP).iter().all(|span| span.len <= LONGEST));
    }

    #[test]
    fn held_or_not_the_answers_are_the_same() {
        let ram = ram();
        let memory = memory(&ram);
        let records = StructReader::new(&memory, FIELDS);
        // The last bases have some or all fields where nothing is.
        for base in [0, 0x123, 0x1001, 0x18fc, 0x1ff0, 0x9000].map(Gva) {
            records.load(base);
            for of in [base, Gva(0x321)] {
                for offset in (0..0x90).chain(0x6f0..0x720) {
                    let at = of.add(offset);
                    assert_eq!(records.u32(at), memory.u32(at));
                    assert_eq!(records.i32(at), memory.i32(at));
                    assert_eq!(records.pointer(at), memory.pointer(at));
                    assert_eq!(records.cstr::<15>(at), memory.cstr(at, 15));
                    for size in 1..10 {
                        let field = field(offset, size);
                        assert_eq!(records.field(of, field), memory.field(of, field));
                    }
                }
            }
        }
    }
}
