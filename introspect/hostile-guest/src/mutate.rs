//! Guest memory with some words changed, as a fuzzer's bytes say.
//!
//! A record has twelve bytes: which part of memory, how the value is meant, the offset in the part,
//! and the value.

use introspect::{CoreFile, OutOfBounds, PhysMemory};
use vm_memory::GuestAddress;

use super::image;

/// The most records that are used.
pub const MAX_CHANGES: usize = 64;
const RECORD: usize = 12;

/// A part of memory: its physical address and its length.
pub type Part = (usize, usize);

/// The parts of memory that [`image`] fills.
pub const PARTS: [Part; 9] = [
    (image::TASKS, 0x9000),
    (image::IMAGE + image::DATA, 0x2000),
    (image::PERCPU, 0x8000),
    (image::MODULES, 0xa000),
    (image::STACKS, 0x1_4000),
    (image::IMAGE + image::TABLES, 0x5000),
    (image::IMAGE + image::BTF, 0x2000),
    (image::IMAGE + image::ORC, 0x1040),
    (image::IMAGE + image::KALLSYMS, 0x4_0000),
];

/// Guest memory and the changes to it.
#[derive(Debug)]
pub struct Mutated<'b, B: Base + ?Sized = [u8]> {
    base: &'b B,
    changes: Vec<(usize, Vec<u8>)>,
}

/// Memory that is not damaged.
pub trait Base: Sync {
    /// Fills `buf` from `gpa` on, as [`PhysMemory::read`] does.
    fn fill(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds>;
}

impl Base for [u8] {
    fn fill(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let len = buf.len();
        let out_of_bounds = OutOfBounds { gpa, len };
        let start = usize::try_from(gpa.0).map_err(|_| out_of_bounds)?;
        let end = start.checked_add(len).ok_or(out_of_bounds)?;
        buf.copy_from_slice(self.get(start..end).ok_or(out_of_bounds)?);
        Ok(())
    }
}

impl Base for CoreFile {
    fn fill(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        self.read(gpa, buf)
    }
}

impl<'b> Mutated<'b> {
    /// Memory changed in `parts` as the records in `data` say.
    pub fn new(base: &'b [u8], parts: &[Part], data: &[u8]) -> Mutated<'b> {
        let mut out = Mutated::of(base);
        let (records, _) = data.as_chunks::<RECORD>();
        for record in records.iter().take(MAX_CHANGES) {
            out.change(parts, record);
        }
        out
    }

    fn change(&mut self, parts: &[Part], record: &[u8; RECORD]) {
        let [part, mode, low, high, value @ ..] = *record;
        let value = u64::from_le_bytes(value);
        let Some(&(start, len)) = parts.get(usize::from(part) % parts.len().max(1)) else {
            return;
        };
        let offset = usize::from(u16::from_le_bytes([low, high]));
        let offset = offset * len.div_ceil(1 << 16).max(1) % len;
        let (direct, ram) = (image::DIRECT, image::RAM as u64);
        let value = match mode & 3 {
            0 => value,
            1 => direct + value % ram,
            2 => image::BASE + value % ram,
            _ => (value % ram) & !0xfff | 3,
        };
        let width = 1 << (3 - (mode >> 2 & 3));
        self.set(start + offset, &value.to_le_bytes()[..width]);
    }
}

impl<'b, B: Base + ?Sized> Mutated<'b, B> {
    /// Memory without changes yet.
    pub fn of(base: &'b B) -> Mutated<'b, B> {
        Mutated {
            base,
            changes: Vec::new(),
        }
    }

    /// Changes the bytes at a physical address.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.changes.push((at, bytes.to_vec()));
    }
}

impl<B: Base + ?Sized> PhysMemory for Mutated<'_, B> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        self.base.fill(gpa, buf)?;
        let start = usize::try_from(gpa.0).unwrap_or(usize::MAX);
        for (at, bytes) in &self.changes {
            for (place, byte) in (*at..).zip(bytes) {
                if let Some(to) = place.checked_sub(start).and_then(|i| buf.get_mut(i)) {
                    *to = *byte;
                }
            }
        }
        Ok(())
    }
}
