//! The symbols of a patch as the kernel has those of a module (`kernel/module/kallsyms.c`), so that
//! its stack traces name the patch's functions.
//!
//! They are found by address only: the module is on no list by which `/proc/kallsyms`, or a search
//! by name, would find it.

use introspect::GvaRange;

use crate::module::Image;

/// Bytes of an `Elf64_Sym`.
const SYMBOL_SIZE: usize = 24;
/// `STT_FUNC`, of binding `STB_LOCAL`.
const FUNCTION: u8 = 2;
/// Any section: the symbol is defined.
const DEFINED: u16 = 1;
/// The name of the entry stubs.
const STUBS: &str = "outpatch_entry_stubs";
/// What `nm` would say of a local function, and of the null symbol.
const LOCAL_TEXT: u8 = b't';
const NULL_TYPE: u8 = b'?';

/// The three arrays of `struct mod_kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kallsyms {
    /// `symtab`: the null symbol, and one for each function.
    pub symtab: Vec<u8>,
    /// `strtab`: their names.
    pub strtab: Vec<u8>,
    /// `typetab`: a letter for each.
    pub typetab: Vec<u8>,
}

impl Kallsyms {
    /// Those of the functions of `image`, and of its entry stubs.
    #[must_use]
    pub fn new(image: &Image, stubs: GvaRange) -> Kallsyms {
        let mut kallsyms = Kallsyms {
            symtab: vec![0; SYMBOL_SIZE],
            strtab: vec![0],
            typetab: vec![NULL_TYPE],
        };
        for symbol in image.symbols.iter().filter(|symbol| symbol.function) {
            let end = symbol.address.add(symbol.size);
            kallsyms.add(&symbol.name, GvaRange::new(symbol.address, end));
        }
        if !stubs.is_empty() {
            kallsyms.add(STUBS, stubs);
        }
        kallsyms
    }

    fn add(&mut self, name: &str, range: GvaRange) {
        let Ok(at) = u32::try_from(self.strtab.len()) else {
            return;
        };
        self.symtab.extend(at.to_le_bytes());
        self.symtab.extend([FUNCTION, 0]);
        self.symtab.extend(DEFINED.to_le_bytes());
        self.symtab.extend(range.start.0.to_le_bytes());
        self.symtab.extend(range.len().to_le_bytes());
        self.strtab.extend(name.as_bytes());
        self.strtab.push(0);
        self.typetab.push(LOCAL_TEXT);
    }
}
