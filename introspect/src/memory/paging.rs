//! x86-64 page tables: which guest-physical address a virtual address is mapped to, and by which
//! entry.
//!
//! This module knows the architecture (Intel SDM volume 3, 4.5); it must not know Linux, except for
//! the pairs of tables under page table isolation. The tables are the guest's and may be hostile: a
//! walk takes at most as many steps as there are levels.

use vm_memory::GuestAddress;

use crate::addr::Gva;
use crate::memory::{OutOfBounds, PhysMemory};
use crate::vcpu::VcpuRegs;
use crate::x86::{
    CR0_PG, CR4_LA57, EFER_LMA, PAGE_SHIFT, PAGE_SIZE, PTE_FRAME, PTE_LARGE, PTE_NO_EXECUTE,
    PTE_PRESENT, PTE_USER, PTE_WRITABLE, TABLE_SHIFT,
};

/// Under page table isolation the user's top-level table is the page after the kernel's
/// (`arch/x86/mm/pti.c`).
const PTI_USER_TABLE: u64 = PAGE_SIZE;

/// An address space: a set of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// The guest-physical address of the top-level table.
    pub root: GuestAddress,
    /// The number of levels: 4, or 5 with CR4.LA57.
    pub levels: u8,
}

/// The mapping of a virtual address: physical address, page size and permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The guest-physical address.
    pub gpa: GuestAddress,
    /// The size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// The leaf entry's value.
    pub entry: u64,
    /// The guest-physical address of the leaf entry.
    pub entry_gpa: GuestAddress,
    /// Whether writes are permitted at every level.
    pub writable: bool,
    /// Whether execution is forbidden at no level.
    pub executable: bool,
    /// Whether user mode is permitted at every level.
    pub user: bool,
}

/// Why a virtual address is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unmapped {
    /// An entry on the way is not present.
    #[error("not mapped (level {level} entry {entry:#x})")]
    NotPresent {
        /// The level of the entry: 1 for the last table, up to the number of levels.
        level: u8,
        /// The entry's value.
        entry: u64,
    },
    /// The address is not canonical: the processor would refuse it.
    #[error("not a canonical address")]
    NonCanonical,
    /// An entry maps a large page at a level that has none.
    #[error("level {level} entry {entry:#x} is malformed")]
    Malformed {
        /// The level of the entry, 4 or 5.
        level: u8,
        /// The entry's value.
        entry: u64,
    },
    /// A table is outside guest memory.
    #[error("page table outside guest memory: {0}")]
    Table(#[from] OutOfBounds),
}

impl AddressSpace {
    /// The page tables in use by the vCPU; `None` when it is not in long mode with paging on.
    ///
    /// In user mode under page table isolation these map little of the kernel: see
    /// [`kernel_half`](Self::kernel_half).
    #[must_use]
    pub fn of_vcpu(regs: &VcpuRegs) -> Option<AddressSpace> {
        let long_mode = regs.cr0 & CR0_PG != 0 && regs.efer & EFER_LMA != 0;
        long_mode.then_some(AddressSpace {
            root: GuestAddress(regs.cr3 & PTE_FRAME),
            levels: if regs.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
        })
    }

    /// The kernel's tables of a pair under page table isolation. Wrong for a kernel without it,
    /// whose tables are not in pairs.
    #[must_use]
    pub fn kernel_half(self) -> AddressSpace {
        AddressSpace {
            root: GuestAddress(self.root.0 & !PTI_USER_TABLE),
            ..self
        }
    }

    /// Walks the tables for `gva`.
    ///
    /// # Errors
    /// [`Unmapped`], with the level at which the walk ended.
    pub fn translate(&self, memory: &dyn PhysMemory, gva: Gva) -> Result<Mapping, Unmapped> {
        if !self.is_canonical(gva) {
            return Err(Unmapped::NonCanonical);
        }
        let mut table = self.root.0 & PTE_FRAME;
        let (mut writable, mut executable, mut user) = (true, true, true);
        for level in (1..=self.levels).rev() {
            let shift = PAGE_SHIFT + TABLE_SHIFT * u32::from(level - 1);
            let entry_gpa = GuestAddress(entry_address(table, gva, shift));
            let mut raw = [0; 8];
            memory.read(entry_gpa, &mut raw)?;
            let entry = u64::from_le_bytes(raw);
            if entry & PTE_PRESENT == 0 {
                return Err(Unmapped::NotPresent { level, entry });
            }
            writable &= entry & PTE_WRITABLE != 0;
            executable &= entry & PTE_NO_EXECUTE == 0;
            user &= entry & PTE_USER != 0;
            let large = level > 1 && entry & PTE_LARGE != 0;
            if large && level > 3 {
                return Err(Unmapped::Malformed { level, entry });
            }
            if large || level == 1 {
                let page_size = 1u64 << shift;
                let offset = gva.0 & (page_size - 1);
                return Ok(Mapping {
                    gpa: GuestAddress(entry & PTE_FRAME & !(page_size - 1) | offset),
                    page_size,
                    entry,
                    entry_gpa,
                    writable,
                    executable,
                    user,
                });
            }
            table = entry & PTE_FRAME;
        }
        Err(Unmapped::NonCanonical)
    }

    /// Whether the bits above the translated ones are copies of the highest translated bit.
    fn is_canonical(&self, gva: Gva) -> bool {
        let unused = if self.levels == 5 { 7 } else { 16 };
        let value = gva.0.cast_signed();
        (value << unused) >> unused == value
    }
}

/// Where the entry for `gva` is in a table whose entries map `1 << shift` bytes each.
const fn entry_address(table: u64, gva: Gva, shift: u32) -> u64 {
    let index = (gva.0 >> shift) & ((1 << TABLE_SHIFT) - 1);
    table | index << 3
}

/// Where the entry for `gva` is in the level 1 table on the way to it.
pub(crate) const fn last_entry(table: u64, gva: Gva) -> u64 {
    entry_address(table, gva, PAGE_SHIFT)
}

/// The frame that an entry of a level 1 table maps; `None` when it is not present.
pub(crate) const fn small_frame(entry: u64) -> Option<u64> {
    if entry & PTE_PRESENT == 0 {
        return None;
    }
    Some(entry & PTE_FRAME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    const SPACE: AddressSpace = AddressSpace {
        root: GuestAddress(0x1000),
        levels: 4,
    };

    fn four_levels() -> Ram {
        let mut ram = Ram::new(0x10_0000);
        ram.u64(
            0x1000 + 8 * 511,
            0x2000 | PTE_PRESENT | PTE_WRITABLE | PTE_USER,
        );
        ram.u64(0x2000 + 8 * 510, 0x3000 | PTE_PRESENT | PTE_WRITABLE);
        ram.u64(0x3000, 0x4000 | PTE_PRESENT | PTE_WRITABLE);
        ram.u64(0x4000 + 8, 0x5000 | PTE_PRESENT | PTE_NO_EXECUTE);
        ram.u64(
            0x3000 + 8,
            0x20_1000 | PTE_PRESENT | PTE_LARGE | PTE_WRITABLE,
        ); // bit 12 is PAT here
        ram
    }

    #[test]
    fn small_page() {
        let ram = four_levels();
        let found = SPACE.translate(&ram, Gva(0xffff_ffff_8000_1234)).unwrap();
        assert_eq!(found.gpa, GuestAddress(0x5234));
        assert_eq!(found.page_size, 0x1000);
        assert_eq!(found.entry_gpa, GuestAddress(0x4008));
        assert!(!found.writable && !found.executable && !found.user);
    }

    #[test]
    fn large_page() {
        let found = SPACE
            .translate(&four_levels(), Gva(0xffff_ffff_8021_2345))
            .unwrap();
        assert_eq!(found.gpa, GuestAddress(0x21_2345));
        assert_eq!(found.page_size, 0x20_0000);
        assert!(found.writable && found.executable && !found.user);
    }

    #[test]
    fn what_is_not_mapped_is_refused_with_its_reason() {
        let mut ram = four_levels();
        let at = |ram: &Ram, gva| SPACE.translate(ram, Gva(gva)).unwrap_err();
        assert_eq!(at(&ram, 0x0000_8000_0000_0000), Unmapped::NonCanonical);
        assert_eq!(at(&ram, 0), Unmapped::NotPresent { level: 4, entry: 0 });
        ram.u64(0x1000, PTE_PRESENT | PTE_LARGE);
        assert!(matches!(at(&ram, 0), Unmapped::Malformed { level: 4, .. }));
        ram.u64(0x1000, 0x7f_ffff_f000 | PTE_PRESENT);
        assert!(matches!(at(&ram, 0), Unmapped::Table(_)));
        // A table that points to itself ends with the levels.
        ram.u64(0x1000, 0x1000 | PTE_PRESENT);
        assert_eq!(
            SPACE.translate(&ram, Gva(0x10)).unwrap().gpa,
            GuestAddress(0x1010)
        );
    }

    #[test]
    fn five_levels_and_the_kernel_half() {
        let mut ram = four_levels();
        ram.u64(0x6000 + 8 * 511, 0x1000 | PTE_PRESENT | PTE_WRITABLE);
        let user = AddressSpace {
            root: GuestAddress(0x7000),
            levels: 5,
        };
        let found = user
            .kernel_half()
            .translate(&ram, Gva(0xffff_ffff_8000_1234))
            .unwrap();
        assert_eq!(found.gpa, GuestAddress(0x5234));
        assert_eq!(
            user.translate(&ram, Gva(0x0100_0000_0000_0000)),
            Err(Unmapped::NonCanonical)
        );
    }

    #[test]
    fn only_long_mode_has_an_address_space() {
        let mut regs = VcpuRegs {
            cr0: CR0_PG,
            cr3: 0x8000_0000_1234_5fff,
            ..VcpuRegs::default()
        };
        assert_eq!(AddressSpace::of_vcpu(&regs), None);
        regs.efer = EFER_LMA;
        assert_eq!(
            AddressSpace::of_vcpu(&regs).unwrap().root,
            GuestAddress(0x1234_5000)
        );
    }
}
