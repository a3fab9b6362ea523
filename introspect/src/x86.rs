//! The x86-64 architecture: bits of control registers, of EFER and of page table entries, and the
//! sizes of pages.
//!
//! This module knows the processor manuals (Intel SDM volume 3, 2.2.1, 2.5 and 4.5); it must not
//! know Linux, KVM or a guest. The names are the manual's, with the register in front.

/// CR0.PE: protected mode is on.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.ET: always set on processors with a built-in floating-point unit.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE: floating-point errors are reported by an exception, not by an interrupt line.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.PG: paging is on.
pub const CR0_PG: u64 = 1 << 31;

/// CR4.PAE: page table entries have eight bytes, as long mode requires.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57: page tables have five levels, not four.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.VMXE: Intel's virtualization instructions are enabled.
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.FRED: events are delivered by FRED and not through the interrupt descriptor table.
pub const CR4_FRED: u64 = 1 << 32;

/// EFER.LME: long mode is used once paging is on.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: the processor is in long mode.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.SVME: AMD's virtualization instructions are enabled (AMD APM volume 2, 3.1.7).
pub const EFER_SVME: u64 = 1 << 12;

/// Bits of an address within a page of the smallest size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page of the smallest size, 4 KiB. A page table has this size too.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Bytes of a large page that an entry of a page directory (level 2) maps, 2 MiB.
pub const LARGE_PAGE_SIZE: u64 = PAGE_SIZE << TABLE_SHIFT;
/// Bits of an address that select the entry of one page table: it has 512 entries.
pub const TABLE_SHIFT: u32 = 9;

/// The entry maps something: the processor ignores all others.
pub const PTE_PRESENT: u64 = 1 << 0;
/// Writes are permitted through the entry.
pub const PTE_WRITABLE: u64 = 1 << 1;
/// User mode may use the entry.
pub const PTE_USER: u64 = 1 << 2;
/// The entry maps a large page and does not lead to another table (levels 2 and 3 only).
pub const PTE_LARGE: u64 = 1 << 7;
/// Execution is forbidden through the entry.
pub const PTE_NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12 of an entry or of CR3: the physical address of the page or table that it leads to.
pub const PTE_FRAME: u64 = 0x000f_ffff_ffff_f000;
