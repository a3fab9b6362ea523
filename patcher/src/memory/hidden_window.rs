//! A hidden window: 2 MiB of memory that the guest's memory map does not name, mapped into its
//! kernel.
//!
//! The code of patches goes there, their constants and their data, each into windows of its own. One
//! entry of `level2_fixmap_pgt` (`arch/x86/kernel/head_64.S`) maps one hidden memory slot. That
//! is the page table of the module area and the fixmap. All address spaces share it, and Linux
//! fills it from both ends: the middle stays free.
//!
//! The mapping is written once and stays for the guest's life. To remove it, guest code would have
//! to flush the guest's TLBs; to leave it costs nothing: the next patch uses the same window.
//!
//! This module knows the page table and one slot; it must not know what is allocated in it.

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, GvaRange};
use vm_memory::GuestAddress;

use crate::memory::range_alloc::RangeAllocator;
use crate::memory::write_batch::WriteBatch;

/// Bytes that one page table entry maps: the size of a hidden window.
pub const WINDOW_SIZE: u64 = 2 << 20;
/// First address that `level2_fixmap_pgt` maps: that of the last GiB.
const TABLE_BASE: u64 = 0xffff_ffff_c000_0000;
/// The entries that outpatch may use: far above the start of the module area, far below the fixmap.
const INDICES: std::ops::Range<u64> = 400..500;
const ENTRY: u64 = 8;
/// Present, accessed, 2 MiB. Not global: with page table isolation and PCIDs, kernel mappings are
/// not global either.
const CODE_BITS: u64 = 0x1 | 0x20 | 0x80;
/// Present, accessed, 2 MiB, not executable.
const RO_DATA_BITS: u64 = 0x1 | 0x20 | 0x80 | 1 << 63;
/// Present, writable, accessed, dirty, 2 MiB, not executable.
const DATA_BITS: u64 = 0x1 | 0x2 | 0x20 | 0x40 | 0x80 | 1 << 63;

/// What a window is for. No window is both writable and executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Readable and executable.
    Code,
    /// Readable.
    RoData,
    /// Readable and writable.
    Data,
}

/// A hidden memory slot and its place in the guest's address space.
#[derive(Clone, Debug)]
pub struct HiddenWindow {
    /// Code or data.
    pub usage: Usage,
    /// Guest-physical address of the slot.
    pub gpa: GuestAddress,
    /// Address of the page table entry that maps it.
    pub entry: Gva,
    /// What is allocated in it.
    pub allocator: RangeAllocator,
    /// Whether the page table entry was written.
    pub mapped: bool,
}

impl HiddenWindow {
    /// A window over the slot at `gpa`, at the first entry of the page table at `table` that is
    /// empty and not among `used`; `None` when there is none. Writes nothing.
    ///
    /// # Errors
    /// [`ReadError`] when the table cannot be read.
    pub fn choose(
        memory: &KernelMemory<'_>,
        table: Gva,
        usage: Usage,
        gpa: GuestAddress,
        used: &[Gva],
    ) -> Result<Option<HiddenWindow>, ReadError> {
        for index in INDICES {
            let entry = table.add(index * ENTRY);
            if used.contains(&entry) || memory.u64(entry)? != 0 {
                continue;
            }
            let start = Gva(TABLE_BASE + index * WINDOW_SIZE);
            return Ok(Some(HiddenWindow {
                usage,
                gpa,
                entry,
                allocator: RangeAllocator::new(GvaRange::new(start, start.add(WINDOW_SIZE))),
                mapped: false,
            }));
        }
        Ok(None)
    }

    /// The value of the page table entry when the window is mapped.
    #[must_use]
    pub fn entry_value(&self) -> u64 {
        self.gpa.0
            | match self.usage {
                Usage::Code => CODE_BITS,
                Usage::RoData => RO_DATA_BITS,
                Usage::Data => DATA_BITS,
            }
    }

    /// The guest-physical address of an address in the window.
    #[must_use]
    pub fn gpa_of(&self, gva: Gva) -> GuestAddress {
        GuestAddress(
            self.gpa
                .0
                .wrapping_add(gva.since(self.allocator.range().start)),
        )
    }

    /// Plans the write that maps the window, unless it is mapped already.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan_mapping(
        &self,
        memory: &KernelMemory<'_>,
        writes: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        if self.mapped {
            return Ok(());
        }
        writes.write_kernel(memory, self.entry, &self.entry_value().to_le_bytes())
    }

    /// Whether the page table entry is as it was left: it maps the window once mapped, and is empty
    /// before.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_unchanged(&self, memory: &KernelMemory<'_>) -> Result<bool, ReadError> {
        let expected = if self.mapped { self.entry_value() } else { 0 };
        // The processor may set accessed and dirty bits; `entry_value` has them set already.
        Ok(memory.u64(self.entry)? == expected)
    }

    /// Whether the guest's own page tables lead from the window's first address to the slot, which
    /// shows that the entry was written to the right table.
    #[must_use]
    pub fn is_mapped(&self, memory: &KernelMemory<'_>) -> bool {
        memory
            .translate(self.allocator.range().start)
            .is_ok_and(|mapping| mapping.gpa == self.gpa && mapping.page_size == WINDOW_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::machine::mock::Mock;

    /// A machine whose page directory of the last GiB is itself mapped, as a kernel's tables are.
    fn machine() -> (Mock, Gva) {
        let mut machine = Mock::new(0x40000);
        let directory = machine.directory(Gva(TABLE_BASE));
        let table = Gva(0xffff_8880_0000_0000);
        machine.map(table, directory, 0x3);
        (machine, table)
    }

    fn choose(machine: &Mock, table: Gva, usage: Usage, gpa: GuestAddress) -> Option<HiddenWindow> {
        HiddenWindow::choose(&machine.kernel_memory(), table, usage, gpa, &[]).unwrap()
    }

    #[test]
    fn maps_the_slot_at_the_first_empty_entry() {
        let (mut machine, table) = machine();
        let directory = machine.directory(Gva(TABLE_BASE));
        machine.put(directory + 400 * 8, &1u64.to_le_bytes());
        let gpa = machine.add_hidden_memory(WINDOW_SIZE).unwrap();
        let mut window = choose(&machine, table, Usage::Data, gpa).unwrap();
        assert_eq!(
            window.allocator.range().start,
            Gva(TABLE_BASE + 401 * WINDOW_SIZE)
        );

        assert!(window.is_unchanged(&machine.kernel_memory()).unwrap());
        assert!(!window.is_mapped(&machine.kernel_memory()));
        let mut writes = WriteBatch::new();
        window
            .plan_mapping(&machine.kernel_memory(), &mut writes)
            .unwrap();
        machine.pause().unwrap();
        writes.commit(&mut machine).unwrap();
        window.mapped = true;
        let memory = machine.kernel_memory();
        assert!(window.is_unchanged(&memory).unwrap());
        assert!(window.is_mapped(&memory));
        let mapping = memory.translate(window.allocator.range().start).unwrap();
        assert!(mapping.writable && !mapping.executable);

        let used = [window.entry];
        let other = HiddenWindow::choose(&memory, table, Usage::Code, gpa, &used);
        assert_eq!(other.unwrap().unwrap().entry, table.add(402 * 8));
        let at = window.allocator.range().start;
        assert_eq!(window.gpa_of(at.add(5)).0, gpa.0 + 5);
    }

    #[test]
    fn no_window_is_both_writable_and_executable() {
        for (usage, executable, writable) in [
            (Usage::Code, true, false),
            (Usage::RoData, false, false),
            (Usage::Data, false, true),
        ] {
            let (mut machine, table) = machine();
            let gpa = machine.add_hidden_memory(WINDOW_SIZE).unwrap();
            let window = choose(&machine, table, usage, gpa).unwrap();
            let mut writes = WriteBatch::new();
            window
                .plan_mapping(&machine.kernel_memory(), &mut writes)
                .unwrap();
            machine.pause().unwrap();
            writes.commit(&mut machine).unwrap();
            let start = window.allocator.range().start;
            let mapping = machine.kernel_memory().translate(start).unwrap();
            assert_eq!(
                (mapping.executable, mapping.writable, mapping.user),
                (executable, writable, false),
                "{usage:?}"
            );
        }
    }

    #[test]
    fn a_full_table_is_refused_and_a_changed_entry_noticed() {
        let (mut machine, table) = machine();
        let gpa = machine.add_hidden_memory(WINDOW_SIZE).unwrap();
        let window = choose(&machine, table, Usage::Data, gpa).unwrap();
        let directory = machine.directory(Gva(TABLE_BASE));
        for index in INDICES {
            machine.put(directory + index * 8, &1u64.to_le_bytes());
        }
        assert!(choose(&machine, table, Usage::Data, gpa).is_none());
        assert!(!window.is_unchanged(&machine.kernel_memory()).unwrap());
    }
}
