//! Core files, byte by byte: those that `vmm/src/core_dump.rs` writes, and those that no writer
//! makes.

use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use introspect::PhysMemory;
use introspect::core_dump::notes;
use vm_memory::GuestAddress;

use super::image;

pub const PT_LOAD: u32 = 1;
pub const PT_NOTE: u32 = 4;

/// Bytes of an `Elf64_Ehdr` and of an `Elf64_Phdr`.
const FILE_HEADER: usize = 64;
const HEADER: usize = 56;
/// Offsets of fields of `Elf64_Ehdr`.
pub const E_PHOFF: usize = 32;
pub const E_SHOFF: usize = 40;
pub const E_PHNUM: usize = 56;
/// Offsets of fields of `Elf64_Phdr`.
pub const P_OFFSET: usize = 8;
pub const P_PADDR: usize = 24;
pub const P_FILESZ: usize = 32;
pub const P_MEMSZ: usize = 40;
pub const P_ALIGN: usize = 48;

/// A segment: type, physical address, bytes in memory, and the bytes that are in the file.
pub type Part<'a> = (u32, u64, u64, &'a [u8]);

/// The contents of a file with these segments.
pub fn bytes(parts: &[Part<'_>]) -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    // ET_CORE, EM_X86_64.
    out.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0, FILE_HEADER as u64, 0] {
        out.extend(word.to_le_bytes());
    }
    out.extend([0; 4]);
    for half in [FILE_HEADER, HEADER, parts.len(), 64, 0, 0] {
        out.extend((half as u16).to_le_bytes());
    }
    let mut offset = (FILE_HEADER + HEADER * parts.len()) as u64;
    for (kind, at, len, content) in parts {
        out.extend(kind.to_le_bytes());
        out.extend([4, 0, 0, 0]);
        for word in [offset, 0, *at, content.len() as u64, *len, 0] {
            out.extend(word.to_le_bytes());
        }
        offset += content.len() as u64;
    }
    for (.., content) in parts {
        out.extend_from_slice(content);
    }
    out
}

/// The contents of the file with another value in a field of segment `n`.
pub fn with(parts: &[Part<'_>], n: usize, field: usize, value: u64) -> Vec<u8> {
    let mut out = bytes(parts);
    let at = FILE_HEADER + HEADER * n + field;
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    out
}

/// The notes of `count` vCPUs; each has page tables of its own, one after the other from [`ROOT`]
/// on.
pub fn notes(count: u32) -> Vec<u8> {
    let regs = |index| {
        let mut regs = image::vcpus().remove(0);
        regs.index = index;
        regs.cr3 = ROOT + 0x2000 * u64::from(index);
        regs
    };
    let vcpus: Vec<_> = (0..count).map(regs).collect();
    notes::encode(&vcpus, Some(b"OSRELEASE=6.12.0-made-up\n"))
}

/// The physical address of the first vCPU's page tables.
pub const ROOT: u64 = 1 << 30;

/// The segments of a small core: of the page tables only the words in use, so that even these are
/// scattered, and an image that is all zero.
pub fn good(notes: &[u8]) -> Vec<Part<'_>> {
    const NEXT: &[u8] = &((ROOT + 0x1000) | 3).to_le_bytes();
    const LAST: &[u8] = &((ROOT + 0x2000) | 3).to_le_bytes();
    const IMAGE: &[u8] = &(image::IMAGE as u64 | 0x83).to_le_bytes();
    vec![
        (PT_NOTE, 0, 0, notes),
        (PT_LOAD, image::IMAGE as u64, 2 << 20, &[]),
        (PT_LOAD, ROOT + 8 * 511, 8, NEXT),
        (PT_LOAD, ROOT + 0x1000 + 8 * 510, 8, LAST),
        (PT_LOAD, ROOT + 0x2000 + 8 * 8, 8, IMAGE),
        (PT_LOAD, 1 << 40, 1 << 20, b"high"),
    ]
}

/// A temporary file with these contents, unlinked already.
///
/// # Panics
/// If the file cannot be created or written.
pub fn file(bytes: &[u8]) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let unique = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("outpatch-hostile-{}-{unique}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let mut file = options.open(&path).expect("a temporary file");
    fs::remove_file(&path).expect("it was just created");
    file.write_all(bytes).expect("space for a small file");
    file
}

/// Reads around both ends of the first ranges, and returns how many reads succeeded.
pub fn edges(core: &introspect::CoreFile) -> usize {
    let around = |at: u64| [at.saturating_sub(32), at, at.saturating_add(1)];
    let mut buf = [0; 64];
    core.ranges()
        .take(64)
        .flat_map(|(start, len)| [start.0, start.0 + len])
        .flat_map(around)
        .filter(|at| core.read(GuestAddress(*at), &mut buf).is_ok())
        .count()
}
