//! Writes a core file of a paused guest: ELF64 with physical addresses, as QEMU's
//! `dump-guest-memory` writes it.
//!
//! This module knows ELF and files; it must not know what the notes contain
//! ([`introspect::core_dump::notes`]) or how the guest is paused (the caller does that). The file
//! is written under another name in the same folder and renamed at the end, so that a file with the
//! given name is always complete. Only its owner can read it, because a guest's memory holds
//! secrets.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use introspect::core_dump::notes;
use introspect::{OutOfBounds, PhysMemory, VcpuRegs};
use object::LittleEndian as LE;
use object::elf;
use object::endian::{U16, U32, U64};
use object::pod;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use vm_memory::GuestAddress;

use crate::vm::memory::VmMemory;

type Header = elf::FileHeader64<LE>;
type ProgramHeader = elf::ProgramHeader64<LE>;

const PAGE: usize = 4096;
const ZEROES: [u8; PAGE] = [0; PAGE];
/// Memory is copied in chunks of this many bytes.
const CHUNK: usize = 1 << 20;

/// Why a core could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The path is relative, so it would depend on the VMM's working directory.
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// A file with this path exists.
    #[error("{} exists", .0.display())]
    Exists(PathBuf),
    /// The file cannot be created.
    #[error("cannot create {}: {source}", path.display())]
    Create {
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file cannot be written completely, or cannot be renamed.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Hidden memory was removed while it was copied.
    #[error(transparent)]
    Memory(#[from] OutOfBounds),
    /// The guest's memory has more ranges than an ELF header can count.
    #[error("the guest's memory has {0} ranges, which is too many for a core file")]
    Ranges(usize),
}

/// A core that is being written. If it is dropped before [`finish`](Self::finish), its file is
/// removed.
#[derive(Debug)]
pub struct CoreDumpWriter {
    file: File,
    /// The file's name until it is complete.
    part: PathBuf,
    path: PathBuf,
}

impl CoreDumpWriter {
    /// Creates the file of a core that will be at `path`.
    ///
    /// # Errors
    /// [`DumpError`]: `path` is not absolute or exists, or a file cannot be created in its folder.
    pub fn create(path: &Path) -> Result<CoreDumpWriter, DumpError> {
        let path = path.to_owned();
        if !path.is_absolute() {
            return Err(DumpError::Relative(path));
        }
        let mut part = path.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        if let Some(there) = [&path, &part]
            .into_iter()
            .find(|p| p.is_symlink() || p.exists())
        {
            return Err(DumpError::Exists(there.clone()));
        }
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part);
        match created {
            Ok(file) => Ok(CoreDumpWriter { file, part, path }),
            Err(source) => Err(DumpError::Create { path: part, source }),
        }
    }

    /// Writes the whole core; its length in bytes. The guest must be paused until this returns.
    ///
    /// # Errors
    /// [`DumpError`]; the core cannot be finished then and must be dropped.
    pub fn write(
        &mut self,
        memory: &VmMemory,
        vcpus: &[VcpuRegs],
        vmcoreinfo: Option<&[u8]>,
    ) -> Result<u64, DumpError> {
        let ranges = memory.ranges();
        let notes = notes::encode(vcpus, vmcoreinfo);
        let layout = Layout::new(&ranges, notes.len())?;
        self.put(&layout.headers(), 0)?;
        self.put(&notes, layout.notes.offset)?;
        for segment in &layout.memory {
            self.copy(memory, segment)?;
        }
        // Zeroes at the end were not written, but count.
        self.file
            .set_len(layout.end)
            .map_err(|source| self.failed(source))?;
        Ok(layout.end)
    }

    /// Syncs the file to the disk and renames it to its path.
    ///
    /// # Errors
    /// [`DumpError`]; the file is removed then.
    pub fn finish(self) -> Result<(), DumpError> {
        self.file.sync_all().map_err(|source| self.failed(source))?;
        let renamed = renameat_with(CWD, &self.part, CWD, &self.path, RenameFlags::NOREPLACE);
        match renamed.map_err(io::Error::from) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(DumpError::Exists(self.path.clone()))
            }
            // Not every file system supports RENAME_NOREPLACE. On the others, that the path did not
            // exist in `create` must do.
            Err(_) => std::fs::rename(&self.part, &self.path).map_err(|source| self.failed(source)),
        }
    }

    /// Copies one range of memory; pages of zeroes become holes in the file.
    fn copy(&self, memory: &VmMemory, segment: &Segment) -> Result<(), DumpError> {
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < segment.len {
            let left = usize::try_from(segment.len - done).unwrap_or(usize::MAX);
            let len = left.min(CHUNK);
            let chunk = buffer.get_mut(..len).unwrap_or_default();
            memory.read(GuestAddress(segment.start + done), chunk)?;
            self.put_sparse(chunk, segment.offset + done)?;
            done += len as u64;
        }
        Ok(())
    }

    /// Writes the runs of pages that are not all zero.
    fn put_sparse(&self, chunk: &[u8], offset: u64) -> Result<(), DumpError> {
        let is_zero = |page: &&[u8]| ZEROES.starts_with(page);
        let pages: Vec<&[u8]> = chunk.chunks(PAGE).collect();
        let mut at = 0;
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let len = run.iter().map(|page| page.len()).sum::<usize>();
            if !run.first().is_some_and(is_zero) {
                let bytes = chunk.get(at..at + len).unwrap_or_default();
                self.put(bytes, offset + at as u64)?;
            }
            at += len;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], offset: u64) -> Result<(), DumpError> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> DumpError {
        DumpError::Write {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for CoreDumpWriter {
    fn drop(&mut self) {
        // After `finish` no file has this name.
        let _ = std::fs::remove_file(&self.part);
    }
}

/// A segment of the file, which one program header describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// Guest-physical address; 0 for the notes.
    start: u64,
    len: u64,
    /// Offset in the file.
    offset: u64,
}

/// The layout of the file: headers, notes, and page-aligned memory.
#[derive(Debug)]
struct Layout {
    notes: Segment,
    memory: Vec<Segment>,
    /// Number of program headers.
    count: u16,
    /// Length of the file in bytes.
    end: u64,
}

impl Layout {
    fn new(ranges: &[(GuestAddress, u64)], notes: usize) -> Result<Layout, DumpError> {
        let count = ranges.len() + 1;
        let count = u16::try_from(count)
            .ok()
            .filter(|count| *count < elf::PN_XNUM)
            .ok_or(DumpError::Ranges(count))?;
        let headers_len = size_of::<Header>() + usize::from(count) * size_of::<ProgramHeader>();
        let notes = Segment {
            start: 0,
            len: notes as u64,
            offset: headers_len as u64,
        };
        let mut end = (notes.offset + notes.len).next_multiple_of(PAGE as u64);
        let memory = ranges
            .iter()
            .map(|(start, len)| {
                let offset = end;
                end = end.saturating_add(*len);
                Segment {
                    start: start.0,
                    len: *len,
                    offset,
                }
            })
            .collect();
        Ok(Layout {
            notes,
            memory,
            count,
            end,
        })
    }

    /// The ELF header and the program headers, that of the notes first.
    fn headers(&self) -> Vec<u8> {
        let mut out = pod::bytes_of(&file_header(self.count)).to_vec();
        let notes = program_header(elf::PT_NOTE, self.notes, 0);
        out.extend_from_slice(pod::bytes_of(&notes));
        for segment in &self.memory {
            let header = program_header(elf::PT_LOAD, *segment, segment.len);
            out.extend_from_slice(pod::bytes_of(&header));
        }
        out
    }
}

fn file_header(count: u16) -> Header {
    let size = |size: usize| U16::new(LE, u16::try_from(size).unwrap_or(u16::MAX));
    Header {
        e_ident: elf::Ident {
            magic: elf::ELFMAG,
            class: elf::ELFCLASS64,
            data: elf::ELFDATA2LSB,
            version: elf::EV_CURRENT,
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, elf::ET_CORE),
        e_machine: U16::new(LE, elf::EM_X86_64),
        e_version: U32::new(LE, u32::from(elf::EV_CURRENT.0)),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, size_of::<Header>() as u64),
        e_shoff: U64::new(LE, 0),
        e_flags: U32::new(LE, elf::FileFlags(0)),
        e_ehsize: size(size_of::<Header>()),
        e_phentsize: size(size_of::<ProgramHeader>()),
        e_phnum: U16::new(LE, count),
        e_shentsize: U16::new(LE, 0),
        e_shnum: U16::new(LE, 0),
        e_shstrndx: U16::new(LE, elf::SymbolSection(0)),
    }
}

/// The header has no virtual address: the notes have the page tables' (CR3).
fn program_header(kind: elf::ProgramType, segment: Segment, in_memory: u64) -> ProgramHeader {
    ProgramHeader {
        p_type: U32::new(LE, kind),
        p_flags: U32::new(LE, elf::ProgramFlags(0)),
        p_offset: U64::new(LE, segment.offset),
        p_vaddr: U64::new(LE, 0),
        p_paddr: U64::new(LE, segment.start),
        p_filesz: U64::new(LE, segment.len),
        p_memsz: U64::new(LE, in_memory),
        p_align: U64::new(LE, 0),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use introspect::CoreFile;
    use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

    use super::*;
    use crate::api::testing::TempDir;

    const HIGH: GuestAddress = GuestAddress(1 << 32);

    fn memory() -> VmMemory {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let memory = VmMemory::new(ram);
        let hidden = GuestRegionMmap::from_range(HIGH, 2 << 20, None).unwrap();
        assert!(memory.insert_hidden(Arc::new(hidden)));
        memory
            .write(GuestAddress(0x1ff8), b"over the edge")
            .unwrap();
        memory.write(HIGH, b"hidden").unwrap();
        memory
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = TempDir::new();
        let path = folder.path().join("core");
        let memory = memory();
        let vcpus = [0, 1].map(|index| {
            let mut regs = VcpuRegs::default();
            (regs.index, regs.lstar) = (index, 7);
            regs
        });
        let mut dump = CoreDumpWriter::create(&path).unwrap();
        let bytes = dump.write(&memory, &vcpus, Some(b"OSRELEASE=6\n")).unwrap();
        assert!(!path.exists(), "it is not complete yet");
        dump.finish().unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), bytes);
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(
            metadata.blocks() * 512 < 1 << 20,
            "zeroes take no disk space"
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

        let core = CoreFile::open(&path).unwrap();
        assert_eq!(core.vcpus(), vcpus);
        assert_eq!(core.ranges().collect::<Vec<_>>(), memory.ranges());
        let (mut from_core, mut from_memory) = (vec![1; 8 << 20], vec![2; 8 << 20]);
        core.read(GuestAddress(0), &mut from_core).unwrap();
        memory.read(GuestAddress(0), &mut from_memory).unwrap();
        assert!(from_core == from_memory);
        let mut hidden = [0; 6];
        core.read(HIGH, &mut hidden).unwrap();
        assert_eq!(&hidden, b"hidden");
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_is_left() {
        let folder = TempDir::new();
        let path = folder.path().join("core");
        let refused = |path: &Path| CoreDumpWriter::create(path).unwrap_err();
        assert!(matches!(refused(Path::new("core")), DumpError::Relative(_)));
        let nowhere = folder.path().join("no/core");
        assert!(matches!(refused(&nowhere), DumpError::Create { .. }));
        drop(CoreDumpWriter::create(&path).unwrap());
        let mut dump = CoreDumpWriter::create(&path).unwrap();
        assert!(matches!(refused(&path), DumpError::Exists(_)));
        dump.write(&memory(), &[], None).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(dump.finish(), Err(DumpError::Exists(_))));
        assert!(matches!(refused(&path), DumpError::Exists(_)));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
