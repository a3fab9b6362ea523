//! For tests: livepatch modules made byte by byte, and a kernel that is a table.
//!
//! The layouts are invented: nothing here may depend on those of a real kernel.

use std::collections::BTreeMap;

use introspect::Gva;

use crate::module::file::klp::KlpLayout;
use crate::module::kernel::{
    AltInstrLayout, Export, JumpEntryLayout, Layouts, ModversionLayout, TargetKernel,
};
use crate::module::{LoadAddresses, TargetError};

pub const A: u64 = 2;
pub const WA: u64 = 3;
pub const AX: u64 = 6;
pub const R64: u32 = 1;
pub const PC32: u32 = 2;
pub const PLT32: u32 = 4;
pub const R32: u32 = 10;
pub const R32S: u32 = 11;
pub const PC64: u32 = 24;

/// Where the tests put modules and their kernel.
pub const LOAD_AT: LoadAddresses = LoadAddresses {
    code: Gva(0xffff_ffff_8100_0000),
    data: Gva(0xffff_ffff_c100_0000),
};
pub const KERNEL: u64 = 0xffff_ffff_8000_0000;

pub fn layouts() -> Layouts {
    Layouts {
        klp: KlpLayout {
            patch_size: 48,
            patch_mod: 0,
            patch_objs: 8,
            patch_states: Some(16),
            patch_replace: 24,
            object_size: 64,
            object_name: 0,
            object_funcs: 8,
            object_callbacks: [
                (16, "pre_patch"),
                (24, "post_patch"),
                (32, "pre_unpatch"),
                (40, "post_unpatch"),
            ],
            func_size: 32,
            func_old_name: 0,
            func_new_func: 8,
            func_old_sympos: 16,
        },
        module_size: 24,
        modversion: Some(ModversionLayout {
            size: 64,
            crc: 0,
            name: 8,
        }),
        alt_instr: AltInstrLayout {
            size: 14,
            instr_offset: 0,
            repl_offset: 4,
            cpuid: 8,
            flags: Some(10),
            instrlen: 12,
            replacementlen: 13,
        },
        jump_entry: JumpEntryLayout {
            size: 16,
            code: 0,
            target: 4,
            key: 8,
        },
        static_key_enabled: 0,
    }
}

/// A kernel that knows what it was told.
#[derive(Clone, Debug)]
pub struct Table {
    pub layouts: Layouts,
    pub vermagic: String,
    pub symbols: BTreeMap<String, Vec<u64>>,
    pub exports: BTreeMap<String, Export>,
    pub capabilities: Vec<u32>,
    pub up: bool,
    pub memory: BTreeMap<u64, Vec<u8>>,
}

impl Table {
    pub fn new() -> Table {
        let mut table = Table {
            layouts: layouts(),
            vermagic: "9.9-test SMP modversions ".into(),
            symbols: BTreeMap::new(),
            exports: BTreeMap::new(),
            capabilities: vec![1 << 3, 0],
            up: true,
            memory: BTreeMap::new(),
        };
        for (name, offset) in [
            ("__fentry__", 0x100),
            ("klp_enable_patch", 0x200),
            ("puts", 0x300),
            ("__x86_return_thunk", 0x400),
            ("module_layout", 0x500),
        ] {
            table.give(name, KERNEL + offset);
        }
        for (name, offset) in [
            ("__x86_return_thunk", 0x400),
            ("x86_return_thunk", 0x8000),
            ("nop_func", 0x600),
            ("__start_ro_after_init", 0x9000),
            ("__end_ro_after_init", 0xa000),
        ] {
            table.symbols.insert(name.into(), vec![KERNEL + offset]);
        }
        table.set(0x8000, &(KERNEL + 0x480).to_le_bytes());
        table
    }

    pub fn give(&mut self, name: &str, address: u64) {
        let export = Export {
            address: Gva(address),
            gpl_only: false,
            namespace: None,
            crc: Some(crc(name)),
        };
        self.exports.insert(name.into(), export);
    }

    /// Bytes at an offset from the kernel's base.
    pub fn set(&mut self, offset: u64, bytes: &[u8]) {
        self.memory.insert(KERNEL + offset, bytes.to_vec());
    }
}

impl TargetKernel for Table {
    fn layouts(&self) -> Result<Layouts, TargetError> {
        Ok(self.layouts.clone())
    }

    fn vermagic(&self) -> Result<String, TargetError> {
        Ok(self.vermagic.clone())
    }

    fn symbols(&self, name: &str) -> Vec<Gva> {
        let found = self.symbols.get(name).cloned().unwrap_or_default();
        found.into_iter().map(Gva).collect()
    }

    fn name_of(&self, address: Gva) -> Option<String> {
        let named = self
            .symbols
            .iter()
            .find(|(_, all)| all.contains(&address.0));
        named.map(|(name, _)| name.clone())
    }

    fn export(&self, name: &str) -> Result<Option<Export>, TargetError> {
        Ok(self.exports.get(name).cloned())
    }

    fn capabilities(&self) -> Result<Vec<u32>, TargetError> {
        Ok(self.capabilities.clone())
    }

    fn is_up(&self) -> Result<bool, TargetError> {
        Ok(self.up)
    }

    fn read(&self, what: &'static str, at: Gva, buf: &mut [u8]) -> Result<(), TargetError> {
        match self.memory.get(&at.0) {
            Some(bytes) if bytes.len() == buf.len() => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            _ => Err(TargetError::Memory { what, at }),
        }
    }
}

/// A version for every name.
pub fn crc(name: &str) -> u32 {
    name.bytes().fold(7, |sum: u32, byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    })
}

#[derive(Clone, Debug)]
pub struct Sec {
    pub name: String,
    pub kind: u32,
    pub flags: u64,
    pub align: u64,
    pub data: Vec<u8>,
    /// For zeroes only.
    pub zeroes: u64,
    /// Offset, type, symbol, addend.
    pub relocations: Vec<(u64, u32, String, i64)>,
    /// The same for `.klp.rela` sections of this name.
    pub klp_relocations: Vec<(String, u64, u32, String, i64)>,
}

#[derive(Clone, Debug)]
pub struct Sym {
    pub name: String,
    /// Name of the section; `None`: undefined.
    pub section: Option<String>,
    pub value: u64,
    pub size: u64,
    /// Binding in the high, type in the low four bits.
    pub info: u8,
    pub shndx: Option<u16>,
}

/// A module to be written.
#[derive(Clone, Debug, Default)]
pub struct Ko {
    pub sections: Vec<Sec>,
    pub symbols: Vec<Sym>,
}

pub const FUNC: u8 = 0x12;
pub const OBJECT: u8 = 0x11;
pub const UNDEFINED: u8 = 0x10;
pub const WEAK: u8 = 0x20;

impl Ko {
    pub fn section(&mut self, name: &str, flags: u64, data: &[u8]) -> &mut Sec {
        self.sections.push(Sec {
            name: name.into(),
            kind: 1,
            flags,
            align: 8,
            data: data.to_vec(),
            zeroes: 0,
            relocations: Vec::new(),
            klp_relocations: Vec::new(),
        });
        self.sections.last_mut().unwrap()
    }

    pub fn get(&mut self, name: &str) -> &mut Sec {
        self.sections.iter_mut().find(|s| s.name == name).unwrap()
    }

    pub fn remove(&mut self, name: &str) {
        self.sections.retain(|s| s.name != name);
    }

    pub fn symbol(&mut self, name: &str, section: &str, value: u64, size: u64, info: u8) {
        self.symbols.push(Sym {
            name: name.into(),
            section: Some(section.into()),
            value,
            size,
            info,
            shndx: None,
        });
    }

    pub fn undefined(&mut self, name: &str, info: u8) {
        self.symbols.push(Sym {
            name: name.into(),
            section: None,
            value: 0,
            size: 0,
            info,
            shndx: None,
        });
    }

    /// Changes a string of `.modinfo`, or with no value takes it away.
    pub fn modinfo(&mut self, key: &str, value: Option<&str>) {
        let info = self.get(".modinfo");
        let mut out = Vec::new();
        for string in info.data.split(|&b| b == 0).filter(|s| !s.is_empty()) {
            if !string.starts_with(format!("{key}=").as_bytes()) {
                out.extend_from_slice(string);
                out.push(0);
            }
        }
        if let Some(value) = value {
            out.extend_from_slice(format!("{key}={value}\0").as_bytes());
        }
        info.data = out;
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut names = vec![0u8];
        let mut strings = vec![0u8];
        let put = |table: &mut Vec<u8>, name: &str| {
            let at = u32::try_from(table.len()).unwrap();
            table.extend_from_slice(name.as_bytes());
            table.push(0);
            at
        };
        let index = |name: &str| self.sections.iter().position(|s| s.name == name).unwrap() + 1;
        let mut symtab = vec![0u8; 24];
        let mut numbers = BTreeMap::new();
        for (number, symbol) in self.symbols.iter().enumerate() {
            numbers.entry(symbol.name.clone()).or_insert(number + 1);
            let section = symbol.section.as_deref().map_or(0, index);
            let shndx = symbol.shndx.unwrap_or(u16::try_from(section).unwrap());
            symtab.extend(put(&mut strings, &symbol.name).to_le_bytes());
            symtab.extend([symbol.info, 0]);
            symtab.extend(shndx.to_le_bytes());
            symtab.extend(symbol.value.to_le_bytes());
            symtab.extend(symbol.size.to_le_bytes());
        }
        // Section symbols, as relocations use them.
        for section in &self.sections {
            let number = symtab.len() / 24;
            numbers.entry(section.name.clone()).or_insert(number);
            symtab.extend([0, 0, 0, 0, 3, 0]);
            symtab.extend(u16::try_from(index(&section.name)).unwrap().to_le_bytes());
            symtab.extend([0; 16]);
        }
        let rela = |(offset, kind, symbol, addend): (u64, u32, &String, i64)| {
            let symbol = *numbers.get(symbol).unwrap_or_else(|| panic!("no {symbol}"));
            let mut out = offset.to_le_bytes().to_vec();
            out.extend(kind.to_le_bytes());
            out.extend(u32::try_from(symbol).unwrap().to_le_bytes());
            out.extend(addend.to_le_bytes());
            out
        };
        // (name, type, flags, link, info, align, entsize, data, size)
        let mut rows = Vec::new();
        for s in &self.sections {
            let size = if s.kind == 8 {
                s.zeroes
            } else {
                s.data.len() as u64
            };
            rows.push((
                s.name.clone(),
                s.kind,
                s.flags,
                0,
                0,
                s.align,
                0,
                s.data.clone(),
                size,
            ));
        }
        let symtab_index = self.sections.len() + 1;
        rows.push((
            ".symtab".into(),
            2,
            0,
            symtab_index + 1,
            1,
            8,
            24,
            symtab,
            0,
        ));
        rows.push((".strtab".into(), 3, 0, 0, 0, 1, 0, strings, 0));
        for s in &self.sections {
            let plain: Vec<u8> = (s.relocations.iter())
                .flat_map(|(o, k, n, a)| rela((*o, *k, n, *a)))
                .collect();
            let info = index(&s.name);
            if !plain.is_empty() {
                let name = format!(".rela{}", s.name);
                rows.push((name, 4, 0x40, symtab_index, info, 8, 24, plain, 0));
            }
            for (name, o, k, n, a) in &s.klp_relocations {
                let data = rela((*o, *k, n, *a));
                rows.push((
                    name.clone(),
                    4,
                    0x0010_0042,
                    symtab_index,
                    info,
                    8,
                    24,
                    data,
                    0,
                ));
            }
        }
        let names_index = rows.len() + 1;
        let named: Vec<u32> = (rows.iter()).map(|row| put(&mut names, &row.0)).collect();
        let own = put(&mut names, ".shstrtab");
        rows.push((String::new(), 3, 0, 0, 0, 1, 0, names, 0));
        let mut out = vec![0u8; 64];
        let mut headers = vec![0u8; 64];
        for (number, (_, kind, flags, link, info, align, entsize, data, size)) in
            rows.into_iter().enumerate()
        {
            out.resize(out.len().next_multiple_of(8), 0);
            headers.extend(named.get(number).copied().unwrap_or(own).to_le_bytes());
            headers.extend(u32::to_le_bytes(kind));
            headers.extend(u64::to_le_bytes(flags));
            headers.extend([0; 8]);
            headers.extend((out.len() as u64).to_le_bytes());
            headers.extend((data.len() as u64).max(size).to_le_bytes());
            headers.extend(u32::try_from(link).unwrap().to_le_bytes());
            headers.extend(u32::try_from(info).unwrap().to_le_bytes());
            headers.extend(u64::to_le_bytes(align));
            headers.extend(u64::to_le_bytes(entsize));
            out.extend(data);
        }
        out.resize(out.len().next_multiple_of(8), 0);
        let table = out.len() as u64;
        let count = u16::try_from(headers.len() / 64).unwrap();
        out.extend(headers);
        let mut header = b"\x7fELF\x02\x01\x01".to_vec();
        header.resize(16, 0);
        header.extend([1, 0, 62, 0, 1, 0, 0, 0]);
        header.extend([0; 16]);
        header.extend(table.to_le_bytes());
        header.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0]);
        header.extend(count.to_le_bytes());
        header.extend(u16::try_from(names_index).unwrap().to_le_bytes());
        out[..64].copy_from_slice(&header);
        out
    }
}

/// Where in `.data` the sample's structures are.
pub const PATCH: u64 = 16;
pub const OBJECTS: u64 = 64;
pub const FUNCTIONS: u64 = 192;

/// A module that patches `victim` and has one of everything that is linked.
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
