//! [`Image`]: a linked module, the bytes to write into the guest and what they are.

use introspect::{Gva, GvaRange};

use crate::module::file::own_addresses::TakenAddresses;

/// A new function of the patch, linked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkedFunction {
    /// Name of the function in `vmlinux` that it replaces.
    pub old_name: String,
    /// Position of that function among those of its name, as in `klp_func.old_sympos`.
    pub sympos: u64,
    /// Address of the new function.
    pub new: Gva,
    /// Length of the new function in bytes; at least 1.
    pub new_size: u64,
}

/// A symbol of the patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSymbol {
    /// Its name in the module.
    pub name: String,
    /// Its address in the guest.
    pub address: Gva,
    /// Its size in bytes; 0 when not known.
    pub size: u64,
    /// Whether it is a function, not data.
    pub function: bool,
}

/// A symbol of the guest that the patch uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Its name in the guest.
    pub name: String,
    /// Its address; null for a weak symbol that the guest does not have.
    pub address: Gva,
}

/// An ORC entry of the patch's code: `struct orc_entry` as the module has it, in the guest kernel's
/// own encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrcRecord {
    /// The address from which the entry applies.
    pub ip: Gva,
    /// The bytes of the entry.
    pub entry: [u8; 6],
}

/// A table in the image that the guest's kernel reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageTable {
    /// The address of its first entry; null when there is none.
    pub at: Gva,
    /// The number of its entries.
    pub count: u32,
}

/// A livepatch module linked for one guest and for fixed addresses in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The module's name.
    pub name: String,
    /// Whether it replaces all earlier patches (`klp_patch.replace`).
    pub replace: bool,
    /// Which of its own addresses it holds.
    pub taken: TakenAddresses,
    /// The bytes of the code region.
    pub code: Vec<u8>,
    /// Address of `code` in the guest.
    pub code_base: Gva,
    /// The part of `code` that is instructions.
    pub text: GvaRange,
    /// The bytes of the data region.
    pub data: Vec<u8>,
    /// Address of `data` in the guest.
    pub data_base: Gva,
    /// The bytes of the region of constants.
    pub rodata: Vec<u8>,
    /// Address of `rodata` in the guest.
    pub rodata_base: Gva,
    /// The place of its `struct module` in `data` (`THIS_MODULE`), which is all zeroes.
    pub module: Gva,
    /// The sorted exception table, in `rodata`.
    pub extable: ImageTable,
    /// The bug table, in `data`.
    pub bugs: ImageTable,
    /// The new functions, in the module's order.
    pub functions: Vec<LinkedFunction>,
    /// The named functions and data of the patch, sorted by address.
    pub symbols: Vec<ImageSymbol>,
    /// The guest's symbols that the patch uses, sorted by name.
    pub imports: Vec<Import>,
    /// The unwind table of its code, sorted by address.
    pub orc: Vec<OrcRecord>,
}

impl Image {
    /// The function or data that covers an address in the patch, for messages.
    #[must_use]
    pub fn symbol_at(&self, address: Gva) -> Option<&ImageSymbol> {
        let next = self.symbols.partition_point(|s| s.address <= address);
        self.symbols
            .get(..next)?
            .iter()
            .rev()
            .take(8)
            .find(|s| address.since(s.address) < s.size)
    }
}

/// Bytes with the address that they will have.
#[derive(Debug)]
pub(in crate::module) struct Buffer {
    pub base: Gva,
    pub bytes: Vec<u8>,
}

impl Buffer {
    fn offset(&self, at: Gva, len: usize) -> Option<usize> {
        let offset = usize::try_from(at.since(self.base)).ok()?;
        (offset.checked_add(len)? <= self.bytes.len()).then_some(offset)
    }

    pub fn get(&self, at: Gva, len: usize) -> Option<&[u8]> {
        let offset = self.offset(at, len)?;
        self.bytes.get(offset..offset + len)
    }

    pub fn get_mut(&mut self, at: Gva, len: usize) -> Option<&mut [u8]> {
        let offset = self.offset(at, len)?;
        self.bytes.get_mut(offset..offset + len)
    }

    pub fn contains(&self, at: Gva) -> bool {
        self.offset(at, 1).is_some()
    }
}
