//! Writes `seeds/TARGET/*`: inputs that get far, and one for each known way to break a structure.

use std::fs;
use std::path::Path;

use hostile_guest::{btf, cores, image, kallsyms, ram};

/// A record of `mutate`: a value to write in a part of memory.
fn record(part: u8, mode: u8, offset: usize, value: u64) -> Vec<u8> {
    let mut out = vec![part, mode];
    out.extend((offset as u16).to_le_bytes());
    out.extend(value.to_le_bytes());
    out
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(target);
    fs::create_dir_all(&folder).expect("a folder for seeds");
    fs::write(folder.join(name), bytes).expect("a seed");
}

fn main() {
    for cut in [0u16, 1, 2, 0x80, 0x1000, 0x2000, 0x8000, 0xa000, 0xffff] {
        write("kallsyms", &format!("cut-{cut:04x}"), &cut.to_le_bytes());
    }
    assert!(kallsyms(&[0, 0]) > 0);
    let digits: Vec<u8> = (b'0'..=b'9').flat_map(|digit| [digit, 0]).collect();
    write(
        "kallsyms",
        "digits",
        &[b"R", &digits.repeat(1000)[..]].concat(),
    );
    write("btf", "good", &btf::section());
    let table = image::IMAGE + image::ORC;
    let part = |at: usize, len: usize| &ram()[at..at + len];
    let mut orc = image::virt(table).to_le_bytes().to_vec();
    orc.extend(32u16.to_le_bytes());
    orc.extend(part(table, 32));
    orc.extend(part(table + 0x1000, 48));
    write("orc", "good", &orc);
    write("orc", "odd-length", &orc[..orc.len() - 5]);
    let mut tables = vec![0, 0];
    tables.extend(0x8040_2010u64.to_le_bytes());
    tables.extend([3, 0, 0, 0, 0, 0, 0, 0].repeat(512));
    write("page_tables", "self", &tables);
    write("tasks", "good", &[]);
    write(
        "tasks",
        "next-is-itself",
        &record(0, 1, 0x100 + 72, image::TASKS as u64 + 0x100 + 72),
    );
    write(
        "tasks",
        "thread-list-to-itself",
        &record(0, 1, 0x200 + 88, image::TASKS as u64 + 0x200 + 88),
    );
    write("modules", "good", &[]);
    write(
        "modules",
        "loop",
        &record(0, 1, 0x1008, image::MODULES as u64 + 8),
    );
    write("modules", "many-symbols", &record(0, 4, 0x208, 0xf_ffff));
    write("modules", "many-entries", &record(0, 4, 200, 0xf_ffff));
    core_files();
    records();
    write("whole", "good", &[]);
    for (part, offset) in (0..9).flat_map(|part| [(part, 8), (part, 0x100)]) {
        write(
            "whole",
            &format!("part-{part}-{offset:03x}"),
            &record(part, 1, offset, image::TASKS as u64),
        );
    }
}

/// Damage to a real guest (`dump`): how much of it is found again, and records with addresses all
/// over what is read of it.
fn records() {
    let mut random = 1u64;
    for how in 0..16u8 {
        let mut out = vec![how];
        for _ in 0..=how {
            for _ in 0..2 {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                out.extend((random ^ random >> 32).to_le_bytes());
            }
        }
        write("whole", &format!("records-{how:02}"), &out);
    }
}

fn core_files() {
    let notes = cores::notes(2);
    let parts = cores::good(&notes);
    let good = cores::bytes(&parts);
    let write = |name: &str, bytes: &[u8]| write("core_file", name, bytes);
    let with = |name: &str, n, field, value| write(name, &cores::with(&parts, n, field, value));
    write("good", &good);
    write("not-elf", b"KDUMP   and more");
    write("no-notes", &cores::bytes(&parts[1..]));
    write("no-memory", &cores::bytes(&parts[..1]));
    write("cut-in-the-headers", &good[..150]);
    write("cut-in-the-notes", &good[..1000]);
    write("cut-in-the-memory", &good[..good.len() - 2]);
    with("overlap", 2, cores::P_PADDR, image::IMAGE as u64 + 4);
    with("offset-beyond-the-file", 2, cores::P_OFFSET, u64::MAX);
    with("notes-beyond-the-file", 0, cores::P_FILESZ, 1 << 20);
    with("notes-without-end", 0, cores::P_FILESZ, u64::MAX);
    with("notes-of-another-alignment", 0, cores::P_ALIGN, 1 << 40);
    with("memory-is-the-headers", 5, cores::P_OFFSET, 0);
    with("an-exabyte-of-zeroes", 5, cores::P_MEMSZ, 1 << 60);
    let mut itself = good.clone();
    itself[cores::E_PHOFF..][..8].fill(0);
    write("headers-are-the-file-header", &itself);
    let mut many = good;
    many[cores::E_PHNUM..][..2].fill(0xff);
    write("count-in-a-section-that-is-not", &many);
}
