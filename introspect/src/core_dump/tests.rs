//! Core files built byte by byte.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;

/// A file that was unlinked already.
pub(crate) fn file(bytes: &[u8]) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let unique = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("outpatch-core-{}-{unique}", std::process::id()));
    let mut options = File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<CoreFile, CoreError> {
    CoreFile::new(file(bytes))
}

/// The error with which the file is refused, as text.
fn refusal(bytes: &[u8]) -> String {
    open(bytes).unwrap_err().to_string()
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The offset at which the contents of segments start.
const CONTENT: u64 = 0x400;

/// Type, physical address, bytes in memory, content.
type Load<'a> = (u32, u64, u64, &'a [u8]);

fn core(parts: &[Load<'_>]) -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    out.extend(4_u16.to_le_bytes()); // ET_CORE
    out.extend(62_u16.to_le_bytes()); // EM_X86_64
    out.extend(1_u32.to_le_bytes());
    for word in [0_u64, 64, 0] {
        out.extend(word.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    out.extend(0_u32.to_le_bytes());
    for half in [64, 56, parts.len() as u16, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    let mut offset = CONTENT;
    for (kind, paddr, memsz, content) in parts {
        let filesz = content.len() as u64;
        out.extend(kind.to_le_bytes());
        out.extend(4_u32.to_le_bytes());
        for word in [offset, 0, *paddr, filesz, *memsz, 0] {
            out.extend(word.to_le_bytes());
        }
        offset += filesz;
    }
    assert!(out.len() <= CONTENT as usize);
    out.resize(CONTENT as usize, 0);
    for (.., content) in parts {
        out.extend_from_slice(content);
    }
    out
}

fn regs(index: u32) -> VcpuRegs {
    VcpuRegs {
        index,
        rip: 0xffff_ffff_8100_0000 + u64::from(index),
        lstar: 0xffff_ffff_81c0_0000,
        online: true,
        ..VcpuRegs::default()
    }
}

fn notes() -> Vec<u8> {
    notes::encode(&[regs(1), regs(0)], Some(b"OSRELEASE=6.1.0\n"))
}

fn good() -> Vec<u8> {
    core(&[
        (PT_NOTE, 0, 0, &notes()),
        // Not sorted; the second segment follows the first without a gap, and one ends with zeroes.
        (PT_LOAD, 0x2000, 0x1000, &[2; 0x1000]),
        (PT_LOAD, 0x1000, 0x1000, &[1; 0x1000]),
        (PT_LOAD, 0x1_0000_0000, 0x1000, b"high"),
    ])
}

#[test]
fn memory_and_vcpus_are_read() {
    let core = open(&good()).unwrap();
    assert_eq!(core.vcpus(), [regs(0), regs(1)]);
    let read = |gpa, len: usize| {
        let mut buf = vec![0xee; len];
        core.read(GuestAddress(gpa), &mut buf).map(|()| buf)
    };
    assert_eq!(read(0x1ffe, 4).unwrap(), [1, 1, 2, 2]);
    assert_eq!(read(0x1_0000_0002, 4).unwrap(), *b"gh\0\0");
    assert_eq!(read(0x1_0000_0fff, 1).unwrap(), [0]);
    assert_eq!(read(0x5000, 0).unwrap(), []);
    for (gpa, len) in [
        (0, 1),
        (0xfff, 2),
        (0x2fff, 2),
        (0x1_0000_0fff, 2),
        (u64::MAX, 2),
    ] {
        let error = read(gpa, len).unwrap_err();
        let gpa = GuestAddress(gpa);
        assert_eq!(error, OutOfBounds { gpa, len });
    }
    let ranges: Vec<_> = core.ranges().map(|(start, len)| (start.0, len)).collect();
    assert_eq!(
        ranges,
        [(0x1000, 0x1000), (0x2000, 0x1000), (0x1_0000_0000, 0x1000)]
    );
}

#[test]
fn read_fields_returns_what_read_returns() {
    let content: Vec<u8> = (0..0x6000_u32).map(|at| (at % 251) as u8).collect();
    // The second segment starts where the first ends, and not all of it is in the file.
    let parts = [
        (PT_LOAD, 0x1000, 0x3000, &content[..0x3000]),
        (PT_LOAD, 0x4000, 0x4000, &content[0x3000..]),
        (PT_NOTE, 0, 0, &notes()),
    ];
    let core = open(&core(&parts)).unwrap();
    for base in [
        0x1000,
        0x1800,
        0x2fff,
        0x4000,
        0x5000,
        0x6800,
        0x9000,
        u64::MAX - 0x10,
    ] {
        for offsets in [
            [0, 0x20, 0x40],
            [8, 0x900, 0x1800],
            [0x1000, 0, 0x2ff0],
            [0, 0x5000, u64::MAX],
        ] {
            let parts = offsets.map(|offset| FieldRange { offset, len: 16 });
            let (mut fields_read, mut read) = ([0; 48], [0; 48]);
            let mut each = parts.iter().zip(read.chunks_mut(16));
            let expected = each.try_for_each(|(part, buf)| {
                core.read(GuestAddress(base.wrapping_add(part.offset)), buf)
            });
            let got = core.read_fields(GuestAddress(base), &parts, &mut fields_read);
            assert_eq!(got, expected, "{offsets:x?} at {base:#x}");
            if got.is_ok() {
                assert_eq!(fields_read, read, "{offsets:x?} at {base:#x}");
            }
        }
    }
}

#[test]
fn qemu_notes_are_used_without_outpatch_notes() {
    let mut bytes = good();
    while let Some(at) = bytes.windows(9).position(|w| w == b"outpatch\0") {
        bytes[at] = b'x';
    }
    let core = open(&bytes).unwrap();
    let rips: Vec<_> = core
        .vcpus()
        .iter()
        .map(|vcpu| (vcpu.index, vcpu.rip))
        .collect();
    assert_eq!(
        rips,
        [(0, regs(1).rip), (1, regs(0).rip)],
        "in the file's order"
    );
    assert_eq!(core.vcpus()[0].lstar, 0);
}

#[test]
fn what_is_no_core_is_refused_with_its_reason() {
    assert!(refusal(b"").contains("not an ELF file"));
    assert!(refusal(b"KDUMP   and more").contains("without -z"));
    let mut other = good();
    other[16] = 2;
    assert!(refusal(&other).contains("not a core"));
    other[16] = 4;
    other[18] = 3;
    assert!(refusal(&other).contains("another machine (3)"));
    other[4] = 1;
    assert!(refusal(&other).contains("64-bit"));
    let memory: Load<'_> = (PT_LOAD, 0, 0x1000, &[0; 0x1000]);
    let thread = notes::encode(&[], None);
    assert!(refusal(&core(&[(PT_NOTE, 0, 0, &thread), memory])).contains("page tables"));
    assert!(refusal(&core(&[memory])).contains("0 notes with plain registers"));
    assert!(refusal(&core(&[(PT_NOTE, 0, 0, &notes())])).contains("no memory"));
    assert!(refusal(&core(&[])).contains("no memory"));
    let error = CoreFile::open(&std::env::temp_dir()).unwrap_err();
    assert!(matches!(error, CoreError::NotRegular));
}

#[test]
fn every_truncation_is_refused() {
    let whole = good();
    for len in (0..whole.len()).step_by(7) {
        let text = refusal(&whole[..len]);
        assert!(
            text.contains("cut short") || text.contains("not an ELF"),
            "{len}: {text}"
        );
    }
}

#[test]
fn impossible_segments_are_refused() {
    let notes = notes();
    let with = |segment: Load<'_>| {
        let memory: Load<'_> = (PT_LOAD, 0x1000, 0x1000, &[0; 0x1000]);
        refusal(&core(&[(PT_NOTE, 0, 0, &notes), memory, segment]))
    };
    assert!(with((PT_LOAD, 0x1fff, 1, b"x")).contains("contain physical 0x1fff"));
    assert!(with((PT_LOAD, 0, u64::MAX, b"x")).contains("contain physical 0x1000"));
    assert!(with((PT_LOAD, u64::MAX, 1, b"x")).contains("address space"));
    assert!(with((PT_LOAD, 0x8000, 1, b"xy")).contains("more bytes in the file"));
}

#[test]
fn a_count_that_does_not_fit_is_in_the_first_section() {
    let mut bytes = good();
    let section = bytes.len();
    bytes[40..48].copy_from_slice(&(section as u64).to_le_bytes());
    bytes[56..58].copy_from_slice(&0xffff_u16.to_le_bytes());
    assert!(refusal(&bytes).contains("its section header would end"));
    bytes.resize(section + 64, 0);
    bytes[section + 44..section + 48].copy_from_slice(&4_u32.to_le_bytes());
    assert_eq!(open(&bytes).unwrap().ranges().count(), 3);
    bytes[section + 44..section + 48].fill(0xff);
    assert!(refusal(&bytes).contains("4294967295 segments"));
}

#[test]
fn malformed_notes_are_refused() {
    let mut bytes = good();
    bytes[54] = 57; // e_phentsize
    assert!(refusal(&bytes).contains("57 bytes each"));
    let mut bytes = good();
    bytes[64 + 32..64 + 40].copy_from_slice(&(1_u64 << 40).to_le_bytes()); // p_filesz
    assert!(refusal(&bytes).contains("bytes of notes"));
    let mut bytes = good();
    bytes[CONTENT as usize + 4..CONTENT as usize + 8].fill(0xff); // n_descsz
    assert!(refusal(&bytes).contains("notes cannot be read"));
    let twice = notes::encode(&[regs(0), regs(0)], None);
    let text = refusal(&core(&[(PT_NOTE, 0, 0, &twice), (PT_LOAD, 0, 1, b"x")]));
    assert!(text.contains("vCPU 0 twice"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(2000)
    })]

    /// Any change leads to a file that is opened or refused, and an opened one can be read
    /// anywhere.
    #[test]
    fn no_mutation_panics(
        // Most changes are in the headers and the notes.
        changes in prop::collection::vec((0_usize..0x1000, any::<u8>()), 0..12),
        words in prop::collection::vec(
            (0_usize..0x140, prop::sample::select(vec![0, 1, 0xfff, u64::MAX - 1, u64::MAX])),
            0..3,
        ),
        cut in 0_usize..0x8000,
    ) {
        let mut bytes = good();
        for (at, value) in changes {
            bytes[at] = value;
        }
        for (at, value) in words {
            bytes[at & !7..(at & !7) + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes.truncate(cut.max(0x40));
        if let Ok(core) = open(&bytes) {
            let mut buf = [0; 64];
            let edges: Vec<_> = core
                .ranges()
                .flat_map(|(start, len)| [start.0, start.0 + len])
                .collect();
            for at in edges {
                for gpa in [at.saturating_sub(32), at, at.saturating_add(1)] {
                    let _ = core.read(GuestAddress(gpa), &mut buf);
                }
            }
        }
    }
}

/// Low memory and, above a hole, high memory; in the file one directly after the other, as VMMs
/// store it.
const RAW: [RawRange; 2] = [
    RawRange {
        gpa: GuestAddress(1 << 32),
        len: 4,
        offset: 0x1000,
    },
    RawRange {
        gpa: GuestAddress(0),
        len: 0x1000,
        offset: 0,
    },
];

fn raw(ranges: &[RawRange], vcpus: Vec<VcpuRegs>) -> Result<CoreFile, CoreError> {
    let bytes = [&[1; 0x1000][..], b"high"].concat();
    CoreFile::raw(file(&bytes), ranges, vcpus)
}

#[test]
fn a_raw_image_is_read_by_its_ranges() {
    let image = raw(&RAW, vec![regs(1), regs(0)]).unwrap();
    assert_eq!(image.vcpus(), [regs(0), regs(1)]);
    let mut buf = [0; 4];
    image.read(GuestAddress(1 << 32), &mut buf).unwrap();
    assert_eq!(buf, *b"high");
    image.read(GuestAddress(0xffc), &mut buf).unwrap();
    assert_eq!(buf, [1; 4]);
    assert!(image.read(GuestAddress(0xffd), &mut buf).is_err());
    assert!(image.read(GuestAddress((1 << 32) + 1), &mut buf).is_err());
}

#[test]
fn a_raw_image_that_does_not_match_its_ranges_is_refused() {
    let refusal = |ranges: &[RawRange], vcpus| raw(ranges, vcpus).unwrap_err().to_string();
    assert!(refusal(&RAW, Vec::new()).contains("no vCPU's registers"));
    assert!(refusal(&RAW, vec![regs(3), regs(3)]).contains("vCPU 3 twice"));
    assert!(refusal(&[], vec![regs(0)]).contains("no memory"));
    let [high, low] = RAW;
    let with = |range| refusal(&[low, range], vec![regs(0)]);
    let (gpa, len) = (GuestAddress(0xfff), 5);
    assert!(with(RawRange { gpa, ..high }).contains("contain physical 0xfff"));
    assert!(with(RawRange { len, ..high }).contains("cut short"));
    let gpa = GuestAddress(u64::MAX - 2);
    assert!(with(RawRange { gpa, ..high }).contains("address space"));
    let offset = u64::MAX;
    assert!(with(RawRange { offset, ..high }).contains("cut short"));
}
