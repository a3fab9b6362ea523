//! Why a file cannot be read as a core: what was found, where, and what to do about it.

use std::io;

use crate::core_dump::notes::NoteError;

/// Why a file cannot be read as a core or raw image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// The file cannot be opened or read.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    /// The path is a folder, a pipe or a device.
    #[error("it is not a regular file: copy the core file into one")]
    NotRegular,
    /// The file is not ELF; it may be a compressed dump.
    #[error(
        "it is not an ELF file (it starts with {found:02x?}): make it with `outpatch dump`, \
         or with QEMU's dump-guest-memory without -z, -l, -s and -w"
    )]
    NotElf {
        /// The file's first bytes, at most 8.
        found: Vec<u8>,
    },
    /// The file is ELF, but not a core of a 64-bit x86 guest.
    #[error("it is an ELF file, but {found}: a core file of a 64-bit x86 guest is required")]
    OtherElf {
        /// How it differs, as the end of a sentence.
        found: String,
    },
    /// The file is shorter than its headers say.
    #[error(
        "it is cut short: its {what} would end at byte {end:#x}, but the file ends at {len:#x}; \
         copy or dump it again"
    )]
    Truncated {
        /// The part that is missing.
        what: &'static str,
        /// The offset at which that part would end.
        end: u64,
        /// The length of the file.
        len: u64,
    },
    /// A count or a size exceeds the limit of this library.
    #[error("it is damaged: it claims to have {found} {what}, and at most {max} are accepted")]
    TooMuch {
        /// What is counted.
        what: &'static str,
        /// The count or size in the file.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// The entries of a table do not have the size that ELF specifies.
    #[error("it is damaged: its {what} have {found} bytes each instead of {expected}")]
    EntrySize {
        /// The table.
        what: &'static str,
        /// The size in the file, in bytes.
        found: u16,
        /// The size that ELF specifies, in bytes.
        expected: usize,
    },
    /// The description of a segment is impossible.
    #[error(
        "it is damaged: segment {index} (physical {start:#x}..+{len:#x}, \
         {file_len:#x} bytes in the file) {what}"
    )]
    Segment {
        /// The segment's index in the program headers.
        index: usize,
        /// The physical address at which it starts.
        start: u64,
        /// Its length in memory, in bytes.
        len: u64,
        /// Its length in the file, in bytes.
        file_len: u64,
        /// What is wrong with it, as the end of a sentence.
        what: &'static str,
    },
    /// Two segments contain the same physical memory.
    #[error(
        "two of its segments contain physical {at:#x}: a core file by physical addresses is \
         required (dump-guest-memory without -p)"
    )]
    Overlap {
        /// The physical address at which the second one starts.
        at: u64,
    },
    /// The file contains no memory.
    #[error("it contains no memory: it has no PT_LOAD segment or range that is not empty")]
    NoMemory,
    /// The list of notes is malformed.
    #[error("it is damaged: its notes cannot be read: {0}")]
    Notes(object::read::Error),
    /// A note is malformed.
    #[error("it is damaged: note {name} of vCPU {index}: {error}")]
    Note {
        /// The note's name.
        name: &'static str,
        /// The number of notes with the same name before it.
        index: usize,
        /// What is wrong with it.
        error: NoteError,
    },
    /// Two notes, or two of the vCPUs given with a raw image, have the same index.
    #[error("it has the registers of vCPU {0} twice")]
    VcpuTwice(u32),
    /// No note has the control registers of a vCPU, without which the page tables cannot be found.
    #[error(
        "it does not say where the page tables are: it has {plain} notes with plain registers and \
         none named QEMU or outpatch; make it with `outpatch dump` or QEMU's dump-guest-memory"
    )]
    NoVcpus {
        /// The number of notes that have only general registers.
        plain: usize,
    },
    /// A raw image was given without the registers of any vCPU.
    #[error(
        "no vCPU's registers were given with the raw image: they are required to find its page \
         tables"
    )]
    NoRegisters,
}
