//! [`CoreFile`]: a guest's memory and vCPUs from a file.
//!
//! The file is an ELF core, as QEMU's `dump-guest-memory` writes it without paging and as outpatch
//! writes it, or a raw image, for which the caller supplies the registers. This module knows ELF;
//! [`notes`] knows what the notes mean. This module must not know kernels: to the rest of this
//! crate a core is memory like any other ([`PhysMemory`]), and vCPUs that do not run. The file is
//! hostile input: every count, size and range in it is checked when it is opened, and memory is
//! read from it when it is requested, never mapped.

mod block_cache;
mod error;
pub mod notes;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use object::LittleEndian as LE;
use object::elf;
use object::pod::{self, Pod};
use object::read::elf::NoteIterator;
use vm_memory::GuestAddress;

use crate::core_dump::block_cache::CachedFile;
pub use crate::core_dump::error::CoreError;
use crate::core_dump::notes::NoteError;
use crate::memory::{FieldRange, OutOfBounds, PhysMemory, each_field};
use crate::vcpu::VcpuRegs;

type Header = elf::FileHeader64<LE>;
type ProgramHeader = elf::ProgramHeader64<LE>;
type SectionHeader = elf::SectionHeader64<LE>;

/// The most segments that are accepted. A guest has a handful; this many suffice for a dump with a
/// segment for each 2 MiB page of 256 GiB.
const MAX_SEGMENTS: u64 = 1 << 17;
/// The most vCPUs that are accepted, which is QEMU's limit.
const MAX_VCPUS: usize = 4096;
/// The most bytes of notes that are accepted. The notes of [`MAX_VCPUS`] vCPUs have about 5 MiB.
const MAX_NOTES: u64 = 16 << 20;

/// Fields of one structure that span more than this are read one by one. A `task_struct` has some
/// 10 KiB.
const MAX_SINGLE_READ: u64 = 16 << 10;

/// A range of physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    start: u64,
    len: u64,
    /// How many of the bytes are in the file; the others are zero.
    file_len: u64,
    offset: u64,
}

/// A range of a raw image: which physical memory is where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRange {
    /// The guest-physical address at which it starts.
    pub gpa: GuestAddress,
    /// Its length in bytes.
    pub len: u64,
    /// The offset in the file at which it starts.
    pub offset: u64,
}

/// An open core file or raw image.
#[derive(Debug)]
pub struct CoreFile {
    file: CachedFile,
    /// Sorted by address, without overlap.
    segments: Vec<Segment>,
    vcpus: Vec<VcpuRegs>,
}

impl CoreFile {
    /// Opens the core at `path`. This reads its headers and notes, and no memory yet. Linear in
    /// segments and vCPUs, which are both bounded.
    ///
    /// # Errors
    /// [`CoreError`]; it does not include the path.
    pub fn open(path: &Path) -> Result<CoreFile, CoreError> {
        // Opening a pipe would block until another process opens it for writing.
        if !std::fs::metadata(path)?.is_file() {
            return Err(CoreError::NotRegular);
        }
        CoreFile::new(File::open(path)?)
    }

    /// Reads an open file as a core.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn new(file: File) -> Result<CoreFile, CoreError> {
        let input = Input::new(file)?;
        let table = program_headers(&input)?;
        let segments = segments(&input, &table)?;
        let vcpus = vcpus(&input, &table)?;
        Ok(CoreFile {
            file: CachedFile::new(input.file),
            segments,
            vcpus,
        })
    }

    /// Reads an open file as a raw image of a guest's memory, such as QEMU's `pmemsave` writes or a
    /// VMM's memory file.
    ///
    /// Such a file does not describe itself: `ranges` says which guest-physical memory is where in
    /// it, and `vcpus` are the registers of the vCPUs when they were stopped.
    ///
    /// # Errors
    /// [`CoreError`].
    pub fn raw(
        file: File,
        ranges: &[RawRange],
        vcpus: Vec<VcpuRegs>,
    ) -> Result<CoreFile, CoreError> {
        let input = Input::new(file)?;
        at_most("ranges", ranges.len() as u64, MAX_SEGMENTS)?;
        at_most("vCPUs", vcpus.len() as u64, MAX_VCPUS as u64)?;
        if vcpus.is_empty() {
            return Err(CoreError::NoRegisters);
        }
        let range = |range: &RawRange| Segment {
            start: range.gpa.0,
            len: range.len,
            file_len: range.len,
            offset: range.offset,
        };
        let segments = memory(&input, ranges.iter().map(range).enumerate())?;
        let vcpus = in_order(vcpus)?;
        Ok(CoreFile {
            file: CachedFile::new(input.file),
            segments,
            vcpus,
        })
    }

    /// The registers of every vCPU, sorted by index.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuRegs] {
        &self.vcpus
    }

    /// The physical memory in the file: start and length of each range, sorted by address.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        let range = |segment: &Segment| (GuestAddress(segment.start), segment.len);
        self.segments.iter().map(range)
    }

    /// The segment that contains `at`, and the offset of `at` in it.
    fn segment_at(&self, at: u64) -> Option<(&Segment, u64)> {
        let after = self.segments.partition_point(|s| s.start <= at);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let offset = at.checked_sub(segment.start)?;
        (offset < segment.len).then_some((segment, offset))
    }

    /// Reads everything from the first of `fields` of the structure at `gpa` to the end of the
    /// last, with one system call instead of one for each page. Returns the offset of the first
    /// byte in the structure, too. `None` where the range is within one page, longer than
    /// [`MAX_SINGLE_READ`], or not contiguous in the file.
    fn read_range(&self, gpa: GuestAddress, fields: &[FieldRange]) -> Option<(u64, Vec<u8>)> {
        let start = fields.iter().map(|field| field.offset).min()?;
        let ends = fields
            .iter()
            .map(|field| field.offset.saturating_add(field.len as u64));
        let len = ends.max()?.checked_sub(start)?;
        let (segment, offset) = self.segment_at(gpa.0.checked_add(start)?)?;
        let is_in_file = offset.checked_add(len)? <= segment.file_len;
        if !is_in_file || !(block_cache::BLOCK_SIZE as u64..=MAX_SINGLE_READ).contains(&len) {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        let read = self.file.read_exact_at(&mut bytes, segment.offset + offset);
        read.ok().map(|()| (start, bytes))
    }

    /// Fills the first bytes of `buf` with memory from `at` on, as far as one segment goes, and
    /// returns how many.
    fn read_within_segment(&self, at: u64, buf: &mut [u8]) -> Option<usize> {
        let (segment, offset) = self.segment_at(at)?;
        let up_to = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        let len = up_to(segment.len - offset).min(buf.len());
        let in_file = up_to(segment.file_len.saturating_sub(offset)).min(len);
        let (stored, rest) = buf.split_at_mut_checked(in_file)?;
        rest.get_mut(..len - in_file)?.fill(0);
        let read = self.file.read_exact_at(stored, segment.offset + offset);
        if let Err(error) = read {
            tracing::debug!(%error, "the core file cannot be read any more");
            return None;
        }
        Some(len)
    }
}

impl PhysMemory for CoreFile {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let len = buf.len();
        let out_of_bounds = OutOfBounds { gpa, len };
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = gpa.0.checked_add(done as u64).ok_or(out_of_bounds)?;
            done += self.read_within_segment(at, rest).ok_or(out_of_bounds)?;
        }
        Ok(())
    }

    fn read_fields(
        &self,
        gpa: GuestAddress,
        fields: &[FieldRange],
        buf: &mut [u8],
    ) -> Result<(), OutOfBounds> {
        let range = self.read_range(gpa, fields);
        each_field(fields, buf, |offset, now| {
            let copied = range.as_ref().and_then(|(start, bytes)| {
                let from = usize::try_from(offset.checked_sub(*start)?).ok()?;
                bytes.get(from..from.checked_add(now.len())?)
            });
            match copied {
                Some(bytes) => now.copy_from_slice(bytes),
                None => self.read(GuestAddress(gpa.0.wrapping_add(offset)), now)?,
            }
            Ok(())
        })
    }
}

/// The file and its length.
struct Input {
    file: File,
    len: u64,
}

impl Input {
    fn new(file: File) -> Result<Input, CoreError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(CoreError::NotRegular);
        }
        let len = metadata.len();
        Ok(Input { file, len })
    }

    /// Reads `len` bytes at `offset`; the caller has bounded `len`.
    fn bytes(&self, what: &'static str, offset: u64, len: u64) -> Result<Vec<u8>, CoreError> {
        self.check(what, offset, len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Checks that the file has `len` bytes at `offset`.
    fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), CoreError> {
        let end = offset.saturating_add(len);
        if end > self.len {
            let len = self.len;
            return Err(CoreError::Truncated { what, end, len });
        }
        Ok(())
    }

    fn one<T: Pod>(&self, what: &'static str, offset: u64) -> Result<T, CoreError> {
        let len = size_of::<T>() as u64;
        let bytes = self.bytes(what, offset, len)?;
        let end = offset.saturating_add(len);
        let (value, _) = pod::from_bytes::<T>(&bytes).map_err(|()| CoreError::Truncated {
            what,
            end,
            len: self.len,
        })?;
        Ok(*value)
    }
}

fn program_headers(input: &Input) -> Result<Vec<ProgramHeader>, CoreError> {
    let header = file_header(input)?;
    let offset = header.e_phoff.get(LE);
    let count = match header.e_phnum.get(LE) {
        // The number does not fit in the field: it is in the first section's header.
        elf::PN_XNUM => {
            entry_size::<SectionHeader>("section headers", header.e_shentsize.get(LE))?;
            let section: SectionHeader = input.one("section header", header.e_shoff.get(LE))?;
            u64::from(section.sh_info.get(LE))
        }
        count => u64::from(count),
    };
    if count == 0 {
        return Err(CoreError::NoMemory);
    }
    entry_size::<ProgramHeader>("program headers", header.e_phentsize.get(LE))?;
    at_most("segments", count, MAX_SEGMENTS)?;
    let len = count * size_of::<ProgramHeader>() as u64;
    let bytes = input.bytes("program headers", offset, len)?;
    let table = pod::slice_from_all_bytes(&bytes).map_err(|()| CoreError::NoMemory)?;
    Ok(table.to_vec())
}

fn file_header(input: &Input) -> Result<Header, CoreError> {
    let start = input.bytes("first bytes", 0, input.len.min(8))?;
    if !start.starts_with(&elf::ELFMAG) {
        return Err(CoreError::NotElf { found: start });
    }
    let header: Header = input.one("ELF header", 0)?;
    let ident = header.e_ident;
    let other = |found| Err(CoreError::OtherElf { found });
    if ident.class != elf::ELFCLASS64 || ident.data != elf::ELFDATA2LSB {
        return other("not a 64-bit little-endian one".to_owned());
    }
    let (file_type, machine) = (header.e_type.get(LE), header.e_machine.get(LE));
    if file_type != elf::ET_CORE {
        return other(format!("of type {}, not a core", file_type.0));
    }
    if machine != elf::EM_X86_64 {
        return other(format!("of another machine ({})", machine.0));
    }
    Ok(header)
}

fn entry_size<T>(what: &'static str, found: u16) -> Result<(), CoreError> {
    let expected = size_of::<T>();
    if usize::from(found) == expected {
        return Ok(());
    }
    Err(CoreError::EntrySize {
        what,
        found,
        expected,
    })
}

fn at_most(what: &'static str, found: u64, max: u64) -> Result<(), CoreError> {
    if found <= max {
        return Ok(());
    }
    Err(CoreError::TooMuch { what, found, max })
}

/// The memory of all `PT_LOAD` segments, sorted by address.
fn segments(input: &Input, table: &[ProgramHeader]) -> Result<Vec<Segment>, CoreError> {
    let segment = |header: &ProgramHeader| Segment {
        start: header.p_paddr.get(LE),
        len: header.p_memsz.get(LE),
        file_len: header.p_filesz.get(LE),
        offset: header.p_offset.get(LE),
    };
    let loads = (table.iter().enumerate()).filter(|(_, h)| h.p_type.get(LE) == elf::PT_LOAD);
    memory(input, loads.map(|(index, header)| (index, segment(header))))
}

/// Those of `claimed` that are not empty, sorted by address, after checking that each is possible
/// and that none overlap.
fn memory(
    input: &Input,
    claimed: impl Iterator<Item = (usize, Segment)>,
) -> Result<Vec<Segment>, CoreError> {
    let mut segments = Vec::new();
    for (index, segment) in claimed.filter(|(_, segment)| segment.len > 0) {
        let Segment {
            start,
            len,
            file_len,
            offset,
        } = segment;
        let damaged = |what| CoreError::Segment {
            index,
            start,
            len,
            file_len,
            what,
        };
        if start.checked_add(len).is_none() {
            return Err(damaged("exceeds the address space"));
        }
        if file_len > len {
            return Err(damaged("has more bytes in the file than in memory"));
        }
        input.check("memory", offset, file_len)?;
        segments.push(segment);
    }
    segments.sort_by_key(|segment| segment.start);
    for (before, after) in segments.iter().zip(segments.iter().skip(1)) {
        if before.start + before.len > after.start {
            return Err(CoreError::Overlap { at: after.start });
        }
    }
    match segments.is_empty() {
        true => Err(CoreError::NoMemory),
        false => Ok(segments),
    }
}

/// The vCPUs of all notes: from outpatch's notes where there are any, otherwise from QEMU's.
fn vcpus(input: &Input, table: &[ProgramHeader]) -> Result<Vec<VcpuRegs>, CoreError> {
    let mut found = NoteVcpus::default();
    let mut left = MAX_NOTES;
    for header in table.iter().filter(|h| h.p_type.get(LE) == elf::PT_NOTE) {
        let len = header.p_filesz.get(LE);
        at_most("bytes of notes", len, left)?;
        left -= len;
        let bytes = input.bytes("notes", header.p_offset.get(LE), len)?;
        found.read(header.p_align.get(LE), &bytes)?;
    }
    let NoteVcpus { own, qemu, plain } = found;
    let vcpus = if own.is_empty() { qemu } else { own };
    match vcpus.is_empty() {
        true => Err(CoreError::NoVcpus { plain }),
        false => in_order(vcpus),
    }
}

/// The vCPUs sorted by index, after checking that no index occurs twice.
fn in_order(mut vcpus: Vec<VcpuRegs>) -> Result<Vec<VcpuRegs>, CoreError> {
    vcpus.sort_by_key(|vcpu| vcpu.index);
    let mut pairs = vcpus.iter().zip(vcpus.iter().skip(1));
    match pairs.find(|(one, other)| one.index == other.index) {
        Some((twice, _)) => Err(CoreError::VcpuTwice(twice.index)),
        None => Ok(vcpus),
    }
}

/// What the notes contain. Plain register notes are only counted: QEMU's notes have the same
/// registers and the control registers too.
#[derive(Default)]
struct NoteVcpus {
    own: Vec<VcpuRegs>,
    qemu: Vec<VcpuRegs>,
    plain: usize,
}

impl NoteVcpus {
    fn read(&mut self, align: u64, bytes: &[u8]) -> Result<(), CoreError> {
        for note in NoteIterator::<Header>::new(LE, align, bytes).map_err(CoreError::Notes)? {
            let note = note.map_err(CoreError::Notes)?;
            let is = |name: &str| note.name() == name.as_bytes();
            if is(notes::OUTPATCH) {
                push(&mut self.own, notes::OUTPATCH, |_| {
                    notes::parse_outpatch(note.desc())
                })?;
            } else if is(notes::QEMU) {
                push(&mut self.qemu, notes::QEMU, |index| {
                    notes::parse_qemu(index, note.desc())
                })?;
            } else if is(notes::CORE) && note.n_type(LE) == elf::NT_PRSTATUS {
                self.plain += 1;
            }
        }
        Ok(())
    }
}

fn push(
    list: &mut Vec<VcpuRegs>,
    name: &'static str,
    parse: impl FnOnce(u32) -> Result<VcpuRegs, NoteError>,
) -> Result<(), CoreError> {
    let index = list.len();
    at_most("vCPUs", index as u64 + 1, MAX_VCPUS as u64)?;
    let number = u32::try_from(index).unwrap_or(u32::MAX);
    let regs = parse(number).map_err(|error| CoreError::Note { name, index, error })?;
    list.push(regs);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
