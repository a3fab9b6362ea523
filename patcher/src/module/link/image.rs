//! A linked module: the bytes to put into the guest and what they are.

use introspect::{Gva, GvaRange};

/// One function of the patch, ready to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkedFunction {
    /// Name of the function that it replaces, in `vmlinux`.
    pub old_name: String,
    /// Which of several of that name, as in `klp_func.old_sympos`.
    pub sympos: u64,
    /// Its first byte.
    pub new: Gva,
    /// Its length; at least 1.
    pub new_size: u64,
}

/// A symbol of the patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSymbol {
    /// Its name in the module.
    pub name: String,
    /// Where it is.
    pub address: Gva,
    /// Its size, 0 when not known.
    pub size: u64,
    /// Code, not data.
    pub function: bool,
}

/// A symbol of the guest that the patch uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Its name in the guest.
    pub name: String,
    /// What it came to; null for a weak one that the guest has not.
    pub address: Gva,
}

/// One ORC entry of the patch's code: `struct orc_entry` as the module has it, in the guest kernel's own encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrcRecord {
    /// From this address on.
    pub ip: Gva,
    /// The entry.
    pub entry: [u8; 6],
}

/// A livepatch module linked for one guest and one place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The module's name.
    pub name: String,
    /// Atomic replace was asked for.
    pub replace: bool,
    /// Code, then read-only data.
    pub code: Vec<u8>,
    /// Where `code` goes.
    pub code_base: Gva,
    /// The part of `code` that is instructions.
    pub text: GvaRange,
    /// Writable data.
    pub data: Vec<u8>,
    /// Where `data` goes.
    pub data_base: Gva,
    /// The functions that the patch replaces, in the module's order.
    pub functions: Vec<LinkedFunction>,
    /// Named functions and data of the patch, by address.
    pub symbols: Vec<ImageSymbol>,
    /// What it uses of the guest, by name.
    pub imports: Vec<Import>,
    /// Unwind table of its code, by address.
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
