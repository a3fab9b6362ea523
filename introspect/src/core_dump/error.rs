//! Why a file is no core that can be read: what was found, where, and what to do.

use std::io;

use crate::core_dump::notes::NoteError;

/// Why a file is no core that can be read here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// The file cannot be opened or read.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    /// A folder, a pipe, a device.
    #[error("it is not a regular file: copy the core into one")]
    NotRegular,
    /// Something else, or a compressed dump.
    #[error(
        "it is not an ELF file (it begins with {found:02x?}): make it with `outpatch dump`, or with QEMU's dump-guest-memory without -z, -l, -s and -w"
    )]
    NotElf {
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// Another sort of ELF file.
    #[error("it is an ELF file, but {found}: a core of a 64-bit x86 guest is needed")]
    OtherElf {
        /// In what it differs.
        found: String,
    },
    /// The file ends before what its headers promise.
    #[error(
        "it is cut short: its {what} would end at byte {end:#x} and the file at {len:#x}; copy or dump it again"
    )]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where that would end.
        end: u64,
        /// Where the file does.
        len: u64,
    },
    /// A count or a size beyond any that makes sense.
    #[error("it is damaged: it claims {found} {what}, and at most {most} make sense")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// What it says.
        found: u64,
        /// Our bound.
        most: u64,
    },
    /// Table entries of another size than ELF has.
    #[error("it is damaged: its {what} have {found} bytes each and not {expected}")]
    EntrySize {
        /// Which table's.
        what: &'static str,
        /// What it says.
        found: u16,
        /// What ELF says.
        expected: usize,
    },
    /// A segment that cannot be.
    #[error(
        "it is damaged: segment {index} (physical {start:#x}..+{len:#x}, {file_len:#x} bytes in the file) {what}"
    )]
    Segment {
        /// Its number.
        index: usize,
        /// Where it begins in physical memory.
        start: u64,
        /// Its bytes in memory.
        len: u64,
        /// Its bytes in the file.
        file_len: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Two segments claim the same memory.
    #[error(
        "two of its segments hold physical {at:#x}: a core by physical addresses is needed (dump-guest-memory without -p)"
    )]
    Overlap {
        /// Where the second begins.
        at: u64,
    },
    /// No memory at all.
    #[error("it holds no memory: it has no PT_LOAD segment, or range, with anything in it")]
    NoMemory,
    /// The list of notes is broken.
    #[error("it is damaged: its notes cannot be read: {0}")]
    Notes(object::read::Error),
    /// A note is broken.
    #[error("it is damaged: note {name} of vCPU {index}: {error}")]
    Note {
        /// Its name.
        name: &'static str,
        /// The number of notes of that name before it.
        index: usize,
        /// What is wrong.
        error: NoteError,
    },
    /// Two notes, or two of the vCPUs given with a raw image, are of one vCPU.
    #[error("it has the registers of vCPU {0} twice")]
    VcpuTwice(u32),
    /// There are no vCPUs whose page tables are known.
    #[error(
        "it does not say where the page tables are: {plain} notes with plain registers and none named QEMU or outpatch; make it with `outpatch dump` or QEMU's dump-guest-memory"
    )]
    NoVcpus {
        /// How many notes have registers of a thread or vCPU.
        plain: usize,
    },
    /// A raw image, and nothing that leads to page tables in it.
    #[error("no vCPU's registers came with the raw image: its page tables are found by them")]
    NoRegisters,
}
