//! Hostile core files.

use introspect::{CoreError, CoreFile, FindError, Kernel, PhysMemory, RawRange, task_list};
use vm_memory::GuestAddress;

use hostile_guest::cores::{self, PT_LOAD, PT_NOTE, Part};
use hostile_guest::{self, bounded};
use hostile_guest::{image, symbols};

fn open(bytes: &[u8]) -> Result<CoreFile, CoreError> {
    let file = cores::file(bytes);
    bounded("a core", || CoreFile::new(file))
}

fn refusal(bytes: &[u8]) -> CoreError {
    open(bytes).unwrap_err()
}

/// Opens the core and finds its kernel.
fn find(bytes: &[u8]) -> Result<Kernel, FindError> {
    let core = open(bytes).unwrap();
    bounded("a kernel in a core", || Kernel::find(&core, core.vcpus()))
}

#[test]
fn a_core_that_is_whole_can_be_read() {
    let notes = cores::notes(2);
    let core = open(&cores::bytes(&cores::good(&notes))).unwrap();
    assert_eq!(core.vcpus().len(), 2);
    let mut word = [0; 8];
    core.read(GuestAddress((1 << 40) + 2), &mut word).unwrap();
    assert_eq!(word, *b"gh\0\0\0\0\0\0");
}

/// The same guest in a raw image, with its second half first and a gap between them.
#[test]
fn a_raw_image_is_read_like_a_core() {
    let ram = hostile_guest::ram();
    let (low, high) = ram.split_at(image::IMAGE);
    let gap = vec![0xee; 0x3000];
    let bytes = [high, &gap, low].concat();
    let range = |gpa: usize, len: usize, offset: usize| RawRange {
        gpa: GuestAddress(gpa as u64),
        len: len as u64,
        offset: offset as u64,
    };
    let ranges = [
        range(0, low.len(), high.len() + gap.len()),
        range(low.len(), high.len(), 0),
    ];
    let raw = CoreFile::raw(cores::file(&bytes), &ranges, image::vcpus()).unwrap();
    let kernel = Kernel::find(&raw, raw.vcpus()).unwrap();
    assert_eq!(kernel.base, hostile_guest::kernel().base);
    let found = task_list::read(&kernel, &kernel.memory(&raw), raw.vcpus()).unwrap();
    assert_eq!(found.len(), 5);
    let reliable = hostile_guest::stacks(&raw, raw.vcpus());
    assert!(reliable >= 4, "{reliable}");
}

#[test]
fn a_core_cut_anywhere() {
    let notes = cores::notes(2);
    let whole = cores::bytes(&cores::good(&notes));
    for len in 0..whole.len() {
        let error = refusal(&whole[..len]);
        let expected = match len {
            0..4 => matches!(error, CoreError::NotElf { .. }),
            _ => matches!(error, CoreError::Truncated { .. }),
        };
        assert!(expected, "{len}: {error:?}");
    }
}

#[test]
fn files_that_are_no_core_of_a_guest() {
    let notes = cores::notes(1);
    let good = cores::bytes(&cores::good(&notes));
    for text in [&b"KDUMP   "[..], b"makedumpfile", b"#!/bin/sh", &[0; 4096]] {
        let error = refusal(text);
        assert!(matches!(error, CoreError::NotElf { .. }), "{error:?}");
    }
    // EI_CLASS, EI_DATA, e_type, e_machine.
    for at in [4, 5, 16, 18] {
        let mut other = good.clone();
        other[at] ^= 3;
        let error = refusal(&other);
        assert!(matches!(error, CoreError::OtherElf { .. }), "{error:?}");
    }
}

#[test]
fn a_core_whose_segments_overlap() {
    let notes = cores::notes(1);
    let parts = cores::good(&notes);
    let onto = parts[1].1;
    for at in [onto, onto + 1, onto + parts[1].2 - 1] {
        let error = refusal(&cores::with(&parts, 5, cores::P_PADDR, at));
        assert!(matches!(error, CoreError::Overlap { .. }), "{error:?}");
    }
    let error = refusal(&cores::with(&parts, 1, cores::P_PADDR, u64::MAX - 1));
    assert!(
        matches!(error, CoreError::Segment { index: 1, .. }),
        "{error:?}"
    );
}

#[test]
fn a_core_whose_memory_is_its_own_headers() {
    let notes = cores::notes(1);
    let parts = cores::good(&notes);
    let core = open(&cores::with(&parts, 5, cores::P_OFFSET, 0)).unwrap();
    let mut begin = [0; 4];
    core.read(GuestAddress(1 << 40), &mut begin).unwrap();
    assert_eq!(begin, *b"\x7fELF");
    // Headers that are the file's own header, and notes that are the headers.
    let mut itself = cores::bytes(&parts);
    itself[cores::E_PHOFF..][..8].fill(0);
    assert!(open(&itself).is_err());
    let error = refusal(&cores::with(&parts, 0, cores::P_OFFSET, 0));
    assert!(matches!(error, CoreError::Notes(_)), "{error:?}");
}

#[test]
fn a_core_with_offsets_beyond_its_end() {
    let notes = cores::notes(1);
    let parts = cores::good(&notes);
    for n in [0, 2, 5] {
        for offset in [1 << 20, i64::MAX as u64, u64::MAX - 4, u64::MAX] {
            let error = refusal(&cores::with(&parts, n, cores::P_OFFSET, offset));
            assert!(matches!(error, CoreError::Truncated { .. }), "{error:?}");
        }
    }
    for size in [9, u64::MAX] {
        let error = refusal(&cores::with(&parts, 2, cores::P_FILESZ, size));
        assert!(
            matches!(error, CoreError::Segment { index: 2, .. }),
            "{error:?}"
        );
    }
    let mut table = cores::bytes(&parts);
    table[cores::E_PHOFF..][..8].fill(0xff);
    let error = refusal(&table);
    assert!(matches!(error, CoreError::Truncated { .. }), "{error:?}");
}

#[test]
fn a_core_with_notes_of_any_size() {
    let notes = cores::notes(1);
    let parts = cores::good(&notes);
    let filesz = |size| refusal(&cores::with(&parts, 0, cores::P_FILESZ, size));
    assert!(matches!(filesz(u64::MAX), CoreError::TooMuch { .. }));
    assert!(matches!(filesz(17 << 20), CoreError::TooMuch { .. }));
    assert!(matches!(filesz(16 << 20), CoreError::Truncated { .. }));
    // A name, and a description, longer than all notes.
    for field in [0, 4] {
        let mut long = notes.clone();
        long[field..field + 4].fill(0xff);
        let error = refusal(&cores::bytes(&cores::good(&long)));
        assert!(matches!(error, CoreError::Notes(_)), "{error:?}");
    }
    // As many empty notes as fit, without content.
    let empty = vec![0; (16 << 20) / 12 * 12];
    let error = refusal(&cores::bytes(&cores::good(&empty)));
    assert!(
        matches!(error, CoreError::NoVcpus { plain: 0 }),
        "{error:?}"
    );
    let too_many = cores::notes(4097);
    let error = refusal(&cores::bytes(&cores::good(&too_many)));
    assert!(
        matches!(error, CoreError::TooMuch { what: "vCPUs", .. }),
        "{error:?}"
    );
}

#[test]
fn a_core_with_the_same_notes_many_times() {
    let notes = cores::notes(64);
    let parts = vec![(PT_NOTE, 0, 0, &[][..]); 0xfffe];
    let mut bytes = cores::bytes(&parts);
    let table = 64;
    let offset = bytes.len() as u64;
    for n in 0..parts.len() {
        let at = table + 56 * n;
        bytes[at + cores::P_OFFSET..][..8].copy_from_slice(&offset.to_le_bytes());
        bytes[at + cores::P_FILESZ..][..8].copy_from_slice(&(notes.len() as u64).to_le_bytes());
    }
    // One segment of memory, so that the notes are read at all.
    bytes[table..table + 4].copy_from_slice(&PT_LOAD.to_le_bytes());
    bytes[table + cores::P_MEMSZ..][..8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    bytes.extend(notes);
    let error = refusal(&bytes);
    assert!(matches!(error, CoreError::TooMuch { .. }), "{error:?}");
}

#[test]
fn a_core_with_more_segments_than_a_header_can_count() {
    let notes = cores::notes(1);
    let count = (1 << 17) - 1;
    let mut parts: Vec<Part<'_>> = (0..count)
        .map(|n| (PT_LOAD, n << 13, 4096, &[][..]))
        .collect();
    parts.push((PT_NOTE, 0, 0, &notes));
    let mut bytes = cores::bytes(&parts);
    bytes[cores::E_PHNUM..][..2].fill(0xff);
    let section = bytes.len() as u64;
    bytes[cores::E_SHOFF..][..8].copy_from_slice(&section.to_le_bytes());
    let mut header = [0; 64];
    header[44..48].copy_from_slice(&(1u32 << 17).to_le_bytes());
    bytes.extend(header);
    let core = open(&bytes).unwrap();
    assert_eq!(core.ranges().count() as u64, count);
    // One read across many of them.
    let mut buf = vec![0; 1 << 20];
    assert!(core.read(GuestAddress(0), &mut buf).is_err());
    let end = bytes.len() - 20;
    bytes[end..end + 4].copy_from_slice(&(1u32 << 17 | 1).to_le_bytes());
    let error = refusal(&bytes);
    assert!(
        matches!(
            error,
            CoreError::TooMuch {
                what: "segments",
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_core_of_an_exabyte_of_zeroes() {
    let notes = cores::notes(1);
    let parts = cores::good(&notes);
    let found = find(&cores::with(&parts, 5, cores::P_MEMSZ, 1 << 60));
    assert!(
        matches!(found, Err(FindError::Kallsyms { .. })),
        "{found:?}"
    );
    // The file itself may be as long as the system allows, too.
    let file = cores::file(&cores::bytes(&parts));
    file.set_len(1 << 40).unwrap();
    let core = bounded("a core", || CoreFile::new(file)).unwrap();
    assert_eq!(core.vcpus().len(), 1);
}

#[test]
fn a_core_whose_vcpus_each_map_another_image() {
    // Page tables that map the image window as far as an image may reach, for each vCPU to a
    // different place.
    let count = 4096;
    let notes = cores::notes(count);
    let mut tables = vec![0; 0x2000 * count as usize + 0x2000];
    let mut put = |at: usize, value: u64| tables[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for n in 0..count as usize {
        let at = 0x2000 * n;
        let root = cores::ROOT + at as u64;
        // The root page is its own next level, and the last level of that is a page of its own.
        put(at + 8 * 511, root | 3);
        put(at + 8 * 510, (root + 0x1000) | 3);
        for step in 0..128 {
            let frame = (1 << 40) + ((n as u64) << 30) + ((step as u64) << 21);
            put(at + 0x1000 + 8 * step, frame | 0x83);
        }
    }
    let parts = [
        (PT_NOTE, 0, 0, &notes[..]),
        (PT_LOAD, cores::ROOT, tables.len() as u64, &tables),
        (PT_LOAD, 1 << 40, 1 << 43, &[]),
        (PT_LOAD, 0, image::RAM as u64, &[]),
    ];
    let found = find(&cores::bytes(&parts));
    assert!(
        matches!(found, Err(FindError::Kallsyms { .. })),
        "{found:?}"
    );
}

#[test]
fn a_core_with_the_most_symbols() {
    const COUNT: u64 = 1 << 19;
    let tables = |count: u64| {
        let name = |n| (format!("tf{n:07x}"), image::BASE + n);
        let mut all: Vec<_> = (0..count).map(name).collect();
        all[0].0 = "T_text".to_owned();
        symbols::of(image::BASE, &all)
    };
    let notes = cores::notes(1);
    let mut parts = cores::good(&notes);
    // The image's 16 MiB are mapped after its first 2 MiB, which are unchanged.
    let entries: Vec<u8> = (8..16)
        .flat_map(|n: u64| ((n - 7) << 21 | 0x83).to_le_bytes())
        .collect();
    parts[4].2 = entries.len() as u64;
    parts[4].3 = &entries;
    parts[1].2 = 16 << 20;
    for (count, expected) in [(COUNT, "init_top_pgt"), (COUNT + 256, "no symbol names")] {
        let tables = tables(count);
        let mut parts = parts.clone();
        parts[1].3 = &tables;
        let error = find(&cores::bytes(&parts)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
