//! A table in a module that the kernel's loader acts on: the entries of one section.

use crate::module::error::LinkError;
use crate::module::file::elf::{Section, limit};

/// A table of the module, and how messages name it.
#[derive(Clone, Copy)]
pub(in crate::module) struct Table<'a> {
    /// Its name, for messages.
    pub name: &'static str,
    /// The section that holds its entries.
    pub section: &'a Section,
}

impl Table<'_> {
    /// The offsets in the section of the entries of `entry_size` bytes. Trailing bytes that are no
    /// whole entry are left out. More than `max` entries are refused as too many of `what`.
    pub fn offsets(
        &self,
        entry_size: u64,
        what: &'static str,
        max: usize,
    ) -> Result<impl Iterator<Item = u64> + use<>, LinkError> {
        let count = self.section.size.checked_div(entry_size).unwrap_or(0);
        limit(what, usize::try_from(count).unwrap_or(usize::MAX), max)?;
        Ok((0..count).map(move |index| index * entry_size))
    }
}
