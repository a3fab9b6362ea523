//! Where patch data goes, and code where the kernel's text has no cave: memory that the guest's memory map never named.
//!
//! One hidden slot of 2 MiB is mapped by one entry of `level2_fixmap_pgt` (`arch/x86/kernel/head_64.S`), the page table behind
//! the module area and the fixmap. It is shared by all address spaces, and Linux fills it from both ends: the middle stays free.
//!
//! The mapping is made once and stays for the guest's life. To take it away would need the guest's TLBs flushed, by guest code;
//! to leave it costs nothing: the next patch uses the same window.

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, GvaRange};
use vm_memory::GuestAddress;

use crate::memory::range_alloc::RangeAllocator;
use crate::memory::write_batch::WriteBatch;

/// Bytes that one entry maps.
pub const WINDOW: u64 = 2 << 20;
/// First address behind `level2_fixmap_pgt`: the last GiB.
const TABLE_BASE: u64 = 0xffff_ffff_c000_0000;
/// The entries that may be ours: far above where modules begin, far below the fixmap.
const INDICES: std::ops::Range<u64> = 400..500;
const ENTRY: u64 = 8;
/// Present, accessed, 2 MiB. Not global: under page table isolation with PCIDs kernel mappings are not.
const CODE_BITS: u64 = 0x1 | 0x20 | 0x80;
/// Present, writable, accessed, dirty, 2 MiB, not executable.
const DATA_BITS: u64 = 0x1 | 0x2 | 0x20 | 0x40 | 0x80 | 1 << 63;

/// What a window is for: never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Readable and executable.
    Code,
    /// Readable and writable.
    Data,
}

/// One hidden slot and its place in the guest's address space.
#[derive(Clone, Debug)]
pub struct HiddenWindow {
    /// What it is for.
    pub usage: Usage,
    /// The slot.
    pub gpa: GuestAddress,
    /// The page table entry that maps it, and what stands there when it does.
    pub entry: Gva,
    /// Allocations in it.
    pub room: RangeAllocator,
    /// The entry is written.
    pub mapped: bool,
}

impl HiddenWindow {
    /// A window over the slot at `gpa`, at the first entry of the table at `table` that is free and not among `taken`; `None` when
    /// there is none. Nothing is written.
    ///
    /// # Errors
    /// [`ReadError`] when the table cannot be read.
    pub fn choose(
        memory: &KernelMemory<'_>,
        table: Gva,
        usage: Usage,
        gpa: GuestAddress,
        taken: &[Gva],
    ) -> Result<Option<HiddenWindow>, ReadError> {
        for index in INDICES {
            let entry = table.add(index * ENTRY);
            if taken.contains(&entry) || memory.u64(entry)? != 0 {
                continue;
            }
            let start = Gva(TABLE_BASE + index * WINDOW);
            return Ok(Some(HiddenWindow {
                usage,
                gpa,
                entry,
                room: RangeAllocator::new(GvaRange::new(start, start.add(WINDOW))),
                mapped: false,
            }));
        }
        Ok(None)
    }

    /// What the entry holds when the window is mapped.
    #[must_use]
    pub fn entry_value(&self) -> u64 {
        self.gpa.0
            | match self.usage {
                Usage::Code => CODE_BITS,
                Usage::Data => DATA_BITS,
            }
    }

    /// Where an address of the window lies in guest-physical memory.
    #[must_use]
    pub fn gpa_of(&self, gva: Gva) -> GuestAddress {
        GuestAddress(self.gpa.0.wrapping_add(gva.since(self.room.range().start)))
    }

    /// Adds to `plan` what maps the window, when it is not mapped yet.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan_mapping(
        &self,
        memory: &KernelMemory<'_>,
        plan: &mut WriteBatch,
    ) -> Result<(), ReadError> {
        if self.mapped {
            return Ok(());
        }
        plan.write_kernel(memory, self.entry, &self.entry_value().to_le_bytes())
    }

    /// Whether the entry is as it must be: ours when mapped, and empty before.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_unchanged(&self, memory: &KernelMemory<'_>) -> Result<bool, ReadError> {
        let expected = if self.mapped { self.entry_value() } else { 0 };
        // The processor may set accessed and dirty bits; ours are set already.
        Ok(memory.u64(self.entry)? == expected)
    }

    /// Whether the guest's own tables lead from the window's first address to the slot: the proof that the table was the right one.
    #[must_use]
    pub fn is_mapped(&self, memory: &KernelMemory<'_>) -> bool {
        memory
            .translate(self.room.range().start)
            .is_ok_and(|mapping| mapping.gpa == self.gpa && mapping.page_size == WINDOW)
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
    fn maps_the_slot_where_the_table_is_free() {
        let (mut machine, table) = machine();
        let directory = machine.directory(Gva(TABLE_BASE));
        machine.put(directory + 400 * 8, &1u64.to_le_bytes());
        let gpa = machine.add_hidden_memory(WINDOW).unwrap();
        let mut window = choose(&machine, table, Usage::Data, gpa).unwrap();
        assert_eq!(window.room.range().start, Gva(TABLE_BASE + 401 * WINDOW));

        assert!(window.is_unchanged(&machine.kernel_memory()).unwrap());
        assert!(!window.is_mapped(&machine.kernel_memory()));
        let mut plan = WriteBatch::new();
        window
            .plan_mapping(&machine.kernel_memory(), &mut plan)
            .unwrap();
        machine.pause().unwrap();
        plan.commit(&mut machine).unwrap();
        window.mapped = true;
        let memory = machine.kernel_memory();
        assert!(window.is_unchanged(&memory).unwrap());
        assert!(window.is_mapped(&memory));
        let mapping = memory.translate(window.room.range().start).unwrap();
        assert!(mapping.writable && !mapping.executable);

        let taken = [window.entry];
        let other = HiddenWindow::choose(&memory, table, Usage::Code, gpa, &taken);
        assert_eq!(other.unwrap().unwrap().entry, table.add(402 * 8));
        let at = window.room.range().start;
        assert_eq!(window.gpa_of(at.add(5)).0, gpa.0 + 5);
    }

    #[test]
    fn code_is_executable_and_not_writable() {
        let (mut machine, table) = machine();
        let gpa = machine.add_hidden_memory(WINDOW).unwrap();
        let window = choose(&machine, table, Usage::Code, gpa).unwrap();
        let mut plan = WriteBatch::new();
        window
            .plan_mapping(&machine.kernel_memory(), &mut plan)
            .unwrap();
        machine.pause().unwrap();
        plan.commit(&mut machine).unwrap();
        let mapping = machine
            .kernel_memory()
            .translate(window.room.range().start)
            .unwrap();
        assert!(mapping.executable && !mapping.writable && !mapping.user);
    }

    #[test]
    fn a_full_table_is_refused_and_a_stolen_entry_noticed() {
        let (mut machine, table) = machine();
        let gpa = machine.add_hidden_memory(WINDOW).unwrap();
        let window = choose(&machine, table, Usage::Data, gpa).unwrap();
        let directory = machine.directory(Gva(TABLE_BASE));
        for index in INDICES {
            machine.put(directory + index * 8, &1u64.to_le_bytes());
        }
        assert!(choose(&machine, table, Usage::Data, gpa).is_none());
        assert!(!window.is_unchanged(&machine.kernel_memory()).unwrap());
    }
}
