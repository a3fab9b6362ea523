//! Test fixtures: livepatch modules made byte by byte, and a kernel to link them for.

pub mod fake_kernel;
pub mod ko;

pub use fake_kernel::{FakeKernel, KERNEL, LOAD_AT, layouts};
pub use ko::{
    A, AX, FUNC, Ko, KoSymbol, OBJECT, PC32, PC64, PLT32, R32, R32S, R64, UNDEFINED, WA, WEAK,
};

use crate::module::testing::fake_kernel::crc;

/// Offsets in `.data` of the sample's livepatch structures.
pub const PATCH: u64 = 16;
pub const OBJECTS: u64 = 64;
pub const FUNCTIONS: u64 = 192;

/// A module that patches `victim` and has one entry of every table that the linker acts on.
pub fn sample() -> Ko {
    let mut ko = Ko::default();
    let fentry = [0xe8, 0, 0, 0, 0];
    let mut text = fentry.to_vec(); // 0
    text.extend([0x48, 0xc7, 0xc7, 0, 0, 0, 0]); // 5: mov $string,%rdi
    text.extend([0xe8, 0, 0, 0, 0]); // 12: call puts
    text.extend([0x0f, 0x1f, 0x00]); // 17: alternative: stac
    text.extend([0x66, 0x90]); // 20: static branch to 24
    text.extend([0x31, 0xc0]); // 22: xor %eax,%eax
    text.extend([0xe9, 0, 0, 0, 0]); // 24: return
    text.extend([0xcc; 3]);
    ko.section(".text", AX, &text).relocations = vec![
        (1, PLT32, "__fentry__".into(), -4),
        (8, R32S, ".rodata.str1.1".into(), 4),
        (13, PLT32, "puts".into(), -4),
        (25, PLT32, "__x86_return_thunk".into(), -4),
    ];
    ko.section(".altinstr_replacement", AX, &[0x0f, 0x01, 0xcb]);
    let init = [0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0];
    ko.section(".init.text", AX, &init).relocations = vec![
        (3, R32S, ".data".into(), PATCH as i64),
        (8, PLT32, "klp_enable_patch".into(), -4),
    ];
    let mut entry = vec![0; 8];
    entry.extend([3, 0, 0, 0, 3, 3]);
    ko.section(".altinstructions", A, &entry).relocations = vec![
        (0, PC32, ".text".into(), 17),
        (4, PC32, ".altinstr_replacement".into(), 0),
    ];
    ko.section(".return_sites", A, &[0; 4]).relocations = vec![(0, PC32, ".text".into(), 24)];
    ko.section("__jump_table", WA, &[0; 16]).relocations = vec![
        (0, PC32, ".text".into(), 20),
        (4, PC32, ".text".into(), 24),
        (8, PC64, ".data..ro_after_init".into(), 2),
    ];
    ko.section(".orc_unwind", A, &[1, 0, 0, 0, 5, 0, 2, 0, 0, 0, 6, 0]);
    ko.section(".orc_unwind_ip", A, &[0; 8]).relocations =
        vec![(0, PC32, ".text".into(), 29), (4, PC32, ".text".into(), 0)];
    ko.section(".rodata.str1.1", A, b"pad\0hello\0victim\0");
    let info =
        b"license=GPL\0livepatch=Y\0depends=\0name=sample\0vermagic=9.9-test SMP modversions \0";
    ko.section(".modinfo", A, info);
    ko.section(".gnu.linkonce.this_module", WA, &[0; 24]);
    let mut versions = Vec::new();
    for name in [
        "module_layout",
        "__fentry__",
        "klp_enable_patch",
        "puts",
        "__x86_return_thunk",
    ] {
        versions.extend(u64::from(crc(name)).to_le_bytes());
        let mut field = name.as_bytes().to_vec();
        field.resize(56, 0);
        versions.extend(field);
    }
    ko.section("__versions", A, &versions);
    ko.section(".data", WA, &[0; 320]).relocations = vec![
        (PATCH, R64, "__this_module".into(), 0),
        (PATCH + 8, R64, ".data".into(), OBJECTS as i64),
        (OBJECTS + 8, R64, ".data".into(), FUNCTIONS as i64),
        (FUNCTIONS, R64, ".rodata.str1.1".into(), 10),
        (FUNCTIONS + 8, R64, ".text".into(), 0),
    ];
    ko.section(".data..ro_after_init", WA, &[1, 0, 0, 0, 0, 0, 0, 0]);
    let bss = ko.section(".bss", WA, &[]);
    bss.kind = 8;
    bss.zeroes = 100;
    ko.symbol("new_victim", ".text", 0, 29, FUNC);
    ko.symbol("patch", ".data", PATCH, 48, OBJECT);
    ko.symbol("own_key", ".data..ro_after_init", 0, 8, OBJECT);
    ko.symbol("init_module", ".init.text", 0, 12, FUNC);
    ko.symbol("__this_module", ".gnu.linkonce.this_module", 0, 24, OBJECT);
    for name in [
        "__fentry__",
        "klp_enable_patch",
        "puts",
        "__x86_return_thunk",
    ] {
        ko.undefined(name, UNDEFINED);
    }
    ko
}
