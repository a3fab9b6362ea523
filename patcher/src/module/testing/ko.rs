//! [`Ko`]: module files made section by section and symbol by symbol.

use std::collections::BTreeMap;

pub const A: u64 = 2;
pub const WA: u64 = 3;
pub const AX: u64 = 6;
pub const R64: u32 = 1;
pub const PC32: u32 = 2;
pub const PLT32: u32 = 4;
pub const R32: u32 = 10;
pub const R32S: u32 = 11;
pub const PC64: u32 = 24;

#[derive(Clone, Debug)]
pub struct KoSection {
    pub name: String,
    pub kind: u32,
    pub flags: u64,
    pub align: u64,
    pub data: Vec<u8>,
    /// The size of a section that is all zeroes (`SHT_NOBITS`).
    pub zeroes: u64,
    /// Relocations: offset, type, symbol, addend.
    pub relocations: Vec<(u64, u32, String, i64)>,
    /// Livepatch relocations: name of the `.klp.rela` section, then as above.
    pub klp_relocations: Vec<(String, u64, u32, String, i64)>,
}

#[derive(Clone, Debug)]
pub struct KoSymbol {
    pub name: String,
    /// Name of its section; `None`: it is undefined.
    pub section: Option<String>,
    pub value: u64,
    pub size: u64,
    /// Binding in the high four bits, type in the low four.
    pub info: u8,
    pub shndx: Option<u16>,
}

/// A module file before it is written.
#[derive(Clone, Debug, Default)]
pub struct Ko {
    pub sections: Vec<KoSection>,
    pub symbols: Vec<KoSymbol>,
}

pub const FUNC: u8 = 0x12;
pub const OBJECT: u8 = 0x11;
pub const UNDEFINED: u8 = 0x10;
pub const WEAK: u8 = 0x20;

impl Ko {
    pub fn section(&mut self, name: &str, flags: u64, data: &[u8]) -> &mut KoSection {
        self.sections.push(KoSection {
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

    pub fn get(&mut self, name: &str) -> &mut KoSection {
        self.sections.iter_mut().find(|s| s.name == name).unwrap()
    }

    pub fn remove(&mut self, name: &str) {
        self.sections.retain(|s| s.name != name);
    }

    pub fn symbol(&mut self, name: &str, section: &str, value: u64, size: u64, info: u8) {
        self.symbols.push(KoSymbol {
            name: name.into(),
            section: Some(section.into()),
            value,
            size,
            info,
            shndx: None,
        });
    }

    pub fn undefined(&mut self, name: &str, info: u8) {
        self.symbols.push(KoSymbol {
            name: name.into(),
            section: None,
            value: 0,
            size: 0,
            info,
            shndx: None,
        });
    }

    /// Changes a string of `.modinfo`, or removes it when there is no value.
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

    /// The bytes of the file.
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
        // Name, type, flags, link, info, align, entsize, data, size.
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
