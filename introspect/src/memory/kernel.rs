//! Reading kernel virtual memory: [`KernelMemory`].
//!
//! It caches address translations, so it is valid for one pause: make a new one for the next. This
//! module knows page tables and integers; it must not know which structures are read.

use std::cell::Cell;
use std::fmt;

use vm_memory::GuestAddress;

use crate::addr::Gva;
use crate::memory::paging::{self, AddressSpace, Mapping, Unmapped};
use crate::memory::{self, FieldRange, OutOfBounds, PhysMemory};
use crate::x86::{LARGE_PAGE_SIZE, PAGE_SIZE};

/// Number of slots of each translation cache; a power of two.
const SLOTS: usize = 256;
/// Strings are read in chunks of at most this many bytes.
const CHUNK: usize = 4096;

/// A field of a structure: its offset and size, as BTF has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Field {
    /// Bytes from the start of the structure.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Field {
    /// The address of the field in the structure at `base`.
    #[must_use]
    pub const fn of(self, base: Gva) -> Gva {
        base.add(self.offset)
    }

    /// The address of the structure whose field is at `gva` (the kernel's `container_of`).
    #[must_use]
    pub const fn container(self, gva: Gva) -> Gva {
        gva.sub(self.offset)
    }
}

/// Kernel memory could not be read: where, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read kernel memory at {gva}: {cause}")]
pub struct ReadError {
    /// The first address that could not be read.
    pub gva: Gva,
    /// The reason.
    pub cause: ReadCause,
}

/// Why kernel memory could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadCause {
    /// The page tables map nothing at the address.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// The address is mapped to something outside guest memory.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// A length that the guest states exceeds the bound of this library.
    #[error("{len} bytes exceed the limit of {cap}")]
    TooLong {
        /// The length that the guest states, in bytes.
        len: u64,
        /// The bound, in bytes.
        cap: u64,
    },
    /// The field's size is not 1, 2, 4 or 8 bytes.
    #[error("{0} bytes is not the size of an integer")]
    NotAnInteger(u64),
}

/// Kernel virtual memory of a guest, valid for one pause because translations are cached.
///
/// Get one from [`Kernel::memory`](crate::Kernel::memory). It is not [`Sync`]; each thread makes
/// its own.
pub struct KernelMemory<'m> {
    phys: &'m dyn PhysMemory,
    space: AddressSpace,
    small: Cache,
    large: Cache,
    /// Physical addresses of the level 1 tables, by the 2 MiB that each maps; a processor has the
    /// same in its paging-structure caches.
    tables: Cache,
}

impl fmt::Debug for KernelMemory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelMemory")
            .field("space", &self.space)
            .finish_non_exhaustive()
    }
}

/// Translations of pages of one size: page number to frame address, direct-mapped. Page number
/// `u64::MAX` marks an empty slot; no page has it.
struct Cache(Box<[Cell<(u64, u64)>; SLOTS]>);

impl Cache {
    fn new() -> Cache {
        Cache(Box::new([const { Cell::new((u64::MAX, 0)) }; SLOTS]))
    }

    fn slot(&self, page: u64) -> Option<&Cell<(u64, u64)>> {
        self.0.get(usize::try_from(page % SLOTS as u64).ok()?)
    }

    fn get(&self, page: u64) -> Option<u64> {
        let (key, frame) = self.slot(page)?.get();
        (key == page).then_some(frame)
    }

    fn set(&self, page: u64, frame: u64) {
        if let Some(slot) = self.slot(page) {
            slot.set((page, frame));
        }
    }
}

impl<'m> KernelMemory<'m> {
    /// Kernel memory as the page tables `space` map it.
    #[must_use]
    pub fn new(phys: &'m dyn PhysMemory, space: AddressSpace) -> KernelMemory<'m> {
        KernelMemory {
            phys,
            space,
            small: Cache::new(),
            large: Cache::new(),
            tables: Cache::new(),
        }
    }

    /// The guest-physical memory that is read.
    #[must_use]
    pub fn phys(&self) -> &'m dyn PhysMemory {
        self.phys
    }

    /// The page tables in use.
    #[must_use]
    pub fn space(&self) -> AddressSpace {
        self.space
    }

    /// The mapping of `gva`, from a page table walk that ignores the cache.
    ///
    /// # Errors
    /// [`ReadError`] when the address is not mapped.
    pub fn translate(&self, gva: Gva) -> Result<Mapping, ReadError> {
        self.space
            .translate(self.phys, gva)
            .map_err(|cause| ReadError {
                gva,
                cause: cause.into(),
            })
    }

    /// Fills `buf` from `gva` on.
    ///
    /// # Errors
    /// [`ReadError`]; `buf` may be partly overwritten.
    pub fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut at = gva;
        let mut rest = buf;
        while !rest.is_empty() {
            let (gpa, left) = self.locate(at)?;
            let len = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            self.phys.read(gpa, now).map_err(|cause| ReadError {
                gva: at,
                cause: cause.into(),
            })?;
            at = at.add(len as u64);
            rest = later;
        }
        Ok(())
    }

    /// Fills `buf` with the `fields` of the structure at `gva`, one after the other.
    ///
    /// # Errors
    /// [`ReadError`]; `buf` may be partly overwritten.
    pub(crate) fn read_fields(
        &self,
        gva: Gva,
        fields: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), ReadError> {
        let end = memory::extent(fields).unwrap_or(usize::MAX) as u64;
        let (gpa, left) = self.locate(gva)?;
        if end <= left && self.phys.read_fields(gpa, fields, buf).is_ok() {
            return Ok(());
        }
        memory::each_field(fields, buf, |offset, now| self.read(gva.add(offset), now))
    }

    /// Sets `same[n]` where the `fields` of the structure at `gvas[n]` equal the `n`th group of
    /// `bytes` ([`PhysMemory::compare`]).
    pub(crate) fn compare(
        &self,
        gvas: &[Gva],
        fields: &[FieldRange],
        bytes: &[u8],
        same: &mut [bool],
    ) {
        let Some(end) = memory::extent(fields) else {
            return;
        };
        // No guest has memory at this address.
        let no_memory = GuestAddress(u64::MAX);
        let address = |gva: &Gva| match self.locate(*gva) {
            Ok((gpa, left)) if end as u64 <= left => gpa,
            _ => no_memory,
        };
        let gpas: Vec<GuestAddress> = gvas.iter().map(address).collect();
        self.phys.compare(&gpas, fields, bytes, same);
    }

    /// The physical address of `gva`, and how many bytes from there on are contiguous. Translations
    /// are cached.
    ///
    /// # Errors
    /// [`ReadError`] when the address is not mapped.
    pub fn locate(&self, gva: Gva) -> Result<(GuestAddress, u64), ReadError> {
        let within = |frame: u64, size: u64| {
            let offset = gva.0 % size;
            (GuestAddress(frame.wrapping_add(offset)), size - offset)
        };
        if let Some(frame) = self.large.get(gva.0 / LARGE_PAGE_SIZE) {
            return Ok(within(frame, LARGE_PAGE_SIZE));
        }
        if let Some(frame) = self.small.get(gva.0 / PAGE_SIZE) {
            return Ok(within(frame, PAGE_SIZE));
        }
        if let Some(frame) = self.last_level(gva) {
            self.small.set(gva.0 / PAGE_SIZE, frame);
            return Ok(within(frame, PAGE_SIZE));
        }
        let mapping = self.translate(gva)?;
        if mapping.page_size == PAGE_SIZE {
            let table = mapping.entry_gpa.0 & !(PAGE_SIZE - 1);
            self.tables.set(gva.0 / LARGE_PAGE_SIZE, table);
        }
        let (cache, size) = if mapping.page_size >= LARGE_PAGE_SIZE {
            (&self.large, LARGE_PAGE_SIZE)
        } else {
            (&self.small, PAGE_SIZE)
        };
        let frame = mapping.gpa.0 & !(size - 1);
        cache.set(gva.0 / size, frame);
        Ok(within(frame, size))
    }

    /// The frame of a small page whose level 1 table is cached. `None` also when the entry is not
    /// present, so that the full walk reports the reason.
    fn last_level(&self, gva: Gva) -> Option<u64> {
        let table = self.tables.get(gva.0 / LARGE_PAGE_SIZE)?;
        let entry = GuestAddress(paging::last_entry(table, gva));
        let mut raw = [0; 8];
        self.phys.read(entry, &mut raw).ok()?;
        paging::small_frame(u64::from_le_bytes(raw))
    }

    fn array<const N: usize>(&self, gva: Gva) -> Result<[u8; N], ReadError> {
        let mut raw = [0; N];
        self.read(gva, &mut raw)?;
        Ok(raw)
    }

    /// Reads one byte.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u8(&self, gva: Gva) -> Result<u8, ReadError> {
        self.array(gva).map(u8::from_le_bytes)
    }

    /// Reads a 16-bit integer.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u16(&self, gva: Gva) -> Result<u16, ReadError> {
        self.array(gva).map(u16::from_le_bytes)
    }

    /// Reads a 32-bit integer.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u32(&self, gva: Gva) -> Result<u32, ReadError> {
        self.array(gva).map(u32::from_le_bytes)
    }

    /// Reads a 64-bit integer.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u64(&self, gva: Gva) -> Result<u64, ReadError> {
        self.array(gva).map(u64::from_le_bytes)
    }

    /// Reads a signed 32-bit integer.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn i32(&self, gva: Gva) -> Result<i32, ReadError> {
        self.array(gva).map(i32::from_le_bytes)
    }

    /// Reads a pointer.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn pointer(&self, gva: Gva) -> Result<Gva, ReadError> {
        self.u64(gva).map(Gva)
    }

    /// Reads an integer field of 1, 2, 4 or 8 bytes of the structure at `base`, zero-extended.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn field(&self, base: Gva, field: Field) -> Result<u64, ReadError> {
        let gva = field.of(base);
        match field.size {
            1 => self.u8(gva).map(u64::from),
            2 => self.u16(gva).map(u64::from),
            4 => self.u32(gva).map(u64::from),
            8 => self.u64(gva),
            other => Err(ReadError {
                gva,
                cause: ReadCause::NotAnInteger(other),
            }),
        }
    }

    /// Reads a C string of at most `cap` bytes, without its terminator; it is cut at `cap` when
    /// there is no terminator before. Bytes that are not UTF-8 are replaced.
    ///
    /// # Errors
    /// [`ReadError`] when memory ends before the string does.
    pub fn cstr(&self, gva: Gva, cap: usize) -> Result<String, ReadError> {
        let mut out = Vec::new();
        let mut at = gva;
        while out.len() < cap {
            let (_, left) = self.locate(at)?;
            let len = usize::try_from(left)
                .unwrap_or(CHUNK)
                .min(cap - out.len())
                .min(CHUNK);
            let mut chunk = vec![0; len];
            self.read(at, &mut chunk)?;
            let end = chunk.iter().position(|&byte| byte == 0);
            out.extend_from_slice(chunk.get(..end.unwrap_or(len)).unwrap_or_default());
            if end.is_some() {
                break;
            }
            at = at.add(len as u64);
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// Reads `len` bytes, a length that the guest states; `cap` is the most that is accepted.
    ///
    /// # Errors
    /// [`ReadError`], also when `len` exceeds `cap`.
    pub fn bytes(&self, gva: Gva, len: u64, cap: usize) -> Result<Vec<u8>, ReadError> {
        let too_long = ReadError {
            gva,
            cause: ReadCause::TooLong {
                len,
                cap: cap as u64,
            },
        };
        let len = usize::try_from(len).map_err(|_| too_long)?;
        if len > cap {
            return Err(too_long);
        }
        let mut out = vec![0; len];
        self.read(gva, &mut out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    /// Virtual 0..0x2000 is two frames in reverse order, 0x2000 is not mapped, and a large page
    /// from 2 MiB on is mapped to physical 0.
    fn ram() -> Ram {
        let mut ram = Ram::new(0x8000);
        ram.u64(0x1000, 0x2003);
        ram.u64(0x2000, 0x3003);
        ram.u64(0x3000, 0x4003);
        ram.u64(0x3008, 0x0083);
        ram.u64(0x4000, 0x6003);
        ram.u64(0x4008, 0x5003);
        ram.put(0x6ffc, b"abcd");
        ram.put(0x5000, b"efgh\0");
        ram
    }

    fn memory(ram: &Ram) -> KernelMemory<'_> {
        let space = AddressSpace {
            root: GuestAddress(0x1000),
            levels: 4,
        };
        KernelMemory::new(ram, space)
    }

    #[test]
    fn reads_across_pages() {
        let ram = ram();
        let memory = memory(&ram);
        for _ in 0..2 {
            assert_eq!(
                memory.u64(Gva(0xffc)).unwrap(),
                u64::from_le_bytes(*b"abcdefgh")
            );
            assert_eq!(memory.cstr(Gva(0xffc), 100).unwrap(), "abcdefgh");
        }
        assert_eq!(memory.cstr(Gva(0xffc), 5).unwrap(), "abcde");
        assert_eq!(memory.u64(Gva(0x20_0000 + 0x1000)).unwrap(), 0x2003);
        let field = Field { offset: 2, size: 2 };
        assert_eq!(memory.field(Gva(0xffc), field).unwrap(), 0x6463);
        assert_eq!(field.container(field.of(Gva(7))), Gva(7));
    }

    #[test]
    fn the_entry_of_a_cached_table_is_read_for_each_page() {
        let mut ram = ram();
        ram.u64(0x4010, 0x7003);
        ram.u64(0x7000, 7);
        let memory = memory(&ram);
        assert_eq!(
            memory.u64(Gva(0x1000)).unwrap().to_le_bytes()[..4],
            *b"efgh"
        );
        assert_eq!(memory.u64(Gva(0x2000)).unwrap(), 7);
        let same = memory.space().translate(memory.phys(), Gva(0x3000));
        assert_eq!(
            memory.u64(Gva(0x3000)).unwrap_err().cause,
            ReadCause::Unmapped(same.unwrap_err())
        );
    }

    #[test]
    fn errors_have_the_first_unreadable_address() {
        let ram = ram();
        let memory = memory(&ram);
        assert_eq!(memory.u64(Gva(0x1ffc)).unwrap_err().gva, Gva(0x2000));
        assert_eq!(
            memory.cstr(Gva(0x20_7fff), 8).unwrap_err().gva,
            Gva(0x20_7fff)
        );
        assert!(matches!(
            memory.bytes(Gva(0), u64::MAX, 16).unwrap_err().cause,
            ReadCause::TooLong { cap: 16, .. }
        ));
        let odd = Field { offset: 0, size: 3 };
        assert!(memory.field(Gva(0), odd).is_err());
    }
}
