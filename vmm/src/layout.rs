//! The guest-physical memory map. It is a PC's: low memory, the hole below 1 MiB, RAM, and the
//! device hole below 4 GiB.

use introspect::x86::LARGE_PAGE_SIZE;
use vm_memory::GuestAddress;

/// The boot GDT.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Boot page tables: a PML4, a PDPT and a page directory for each of the first 4 GiB.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// The boot PDPT: see [`PML4`].
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// The boot page directories, four pages: see [`PML4`].
pub const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
/// The stack pointer at the kernel's entry point; the kernel sets up its own at once.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// The kernel's command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The end of low memory, past which a PC has its extended BIOS data area.
pub const LOW_MEMORY_END: GuestAddress = GuestAddress(0x9_fc00);
/// The ACPI tables. The RSDP is at the start of the area, where a guest searches for it.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// The end of the area for ACPI tables.
pub const ACPI_END: GuestAddress = GuestAddress(0xf_0000);
/// Where a PC's processor starts after a reset, `F000:FFF0` in real mode.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// The kernel may use all RAM from here on.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Low RAM ends here at the latest: the rest below 4 GiB is for the interrupt controllers and
/// devices.
pub const HOLE: GuestAddress = GuestAddress(0xd000_0000);
/// RAM that does not fit below the hole continues here.
pub const HOLE_END: GuestAddress = GuestAddress(1 << 32);
/// KVM's own memory on Intel: a page for the identity map, then three pages for the TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages for the TSS: see [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: usize = 0xfffb_d000;
/// The I/O APIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs' registers, also the address of message-signalled interrupts.
pub const LAPIC: u32 = 0xfee0_0000;
/// Hidden memory is added in multiples of this size, which one entry of a page directory maps.
pub const HIDDEN_UNIT: u64 = LARGE_PAGE_SIZE;
/// Hidden memory starts at the first multiple of this past the RAM and past 4 GiB.
pub const HIDDEN_BASE_ALIGN: u64 = 1 << 30;

/// The RAM ranges of a guest with `size` bytes: start and length in bytes.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(HOLE.0);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((HOLE_END, size - low));
    }
    ranges
}

/// The first address of hidden memory in a guest with `ram_size` bytes of RAM.
#[must_use]
pub fn hidden_base(ram_size: u64) -> u64 {
    let ram_end = ram_ranges(ram_size)
        .last()
        .map_or(0, |(start, len)| start.0.saturating_add(*len));
    ram_end
        .max(HOLE_END.0)
        .checked_next_multiple_of(HIDDEN_BASE_ALIGN)
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_out_the_hole() {
        assert_eq!(ram_ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ram_ranges(4 << 30),
            [(GuestAddress(0), 0xd000_0000), (HOLE_END, 0x3000_0000)]
        );
    }

    #[test]
    fn hidden_memory_starts_past_ram_and_hole() {
        assert_eq!(hidden_base(512 << 20), 4 << 30);
        assert_eq!(hidden_base(4 << 30), 5 << 30);
        assert_eq!(hidden_base(u64::MAX), u64::MAX);
    }
}
