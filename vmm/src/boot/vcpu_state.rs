//! The registers with which vCPUs start: model-specific registers for all, and for the boot
//! processor the state that a bzImage's 64-bit entry point requires
//! (`Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol").

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout;
use introspect::x86::{CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_SYSENTER_CS: u32 = 0x174;
const MSR_IA32_SYSENTER_ESP: u32 = 0x175;
const MSR_IA32_SYSENTER_EIP: u32 = 0x176;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SYSCALL_MASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, with write-back as the default type.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

const RFLAGS_RESERVED: u64 = 1 << 1;

const PTE_PRESENT_WRITABLE: u64 = 3;
const PDE_LARGE: u64 = 1 << 7;

/// The selectors that the boot protocol names: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Null, unused, 64-bit code, data.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Why the initial state of a vCPU could not be set.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// KVM refused the named call.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// KVM does not set the MSR with this index.
    #[error("KVM_SET_MSRS: MSR {0:#x} cannot be set")]
    Msr(u32),
    /// There is no guest memory at the address of the boot GDT or the boot page tables.
    #[error("no guest memory for the boot page tables")]
    Memory,
}

/// Sets the MSRs that firmware would have set. Call it after `KVM_SET_CPUID2`, on which it depends
/// which MSRs exist.
///
/// # Errors
/// [`RegisterError`].
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let values = [
        (MSR_IA32_SYSENTER_CS, 0),
        (MSR_IA32_SYSENTER_ESP, 0),
        (MSR_IA32_SYSENTER_EIP, 0),
        (MSR_STAR, 0),
        (MSR_CSTAR, 0),
        (MSR_LSTAR, 0),
        (MSR_SYSCALL_MASK, 0),
        (MSR_KERNEL_GS_BASE, 0),
        (MSR_IA32_TSC, 0),
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ];
    let entries = values.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| RegisterError::Msr(0))?;
    let count = vcpu
        .set_msrs(&msrs)
        .map_err(|e| RegisterError::Kvm("KVM_SET_MSRS", e))?;
    match values.get(count) {
        None => Ok(()),
        Some((refused, _)) => Err(RegisterError::Msr(*refused)),
    }
}

/// Writes the boot GDT, and boot page tables that map the first 4 GiB to the same physical
/// addresses.
///
/// # Errors
/// [`RegisterError::Memory`].
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), RegisterError> {
    let put = |value: u64, base: GuestAddress, index: u64| {
        memory
            .write_obj(value, GuestAddress(base.0 + index * 8))
            .map_err(|_| RegisterError::Memory)
    };
    for (index, descriptor) in (0..).zip(GDT) {
        put(descriptor, layout::GDT, index)?;
    }
    put(layout::PDPT.0 | PTE_PRESENT_WRITABLE, layout::PML4, 0)?;
    for directory in 0..4 {
        put(
            (layout::PAGE_DIRECTORIES.0 + (directory << 12)) | PTE_PRESENT_WRITABLE,
            layout::PDPT,
            directory,
        )?;
    }
    for page in 0..4 * 512 {
        put(
            page << 21 | PDE_LARGE | PTE_PRESENT_WRITABLE,
            layout::PAGE_DIRECTORIES,
            page,
        )?;
    }
    Ok(())
}

/// Sets the boot processor's registers to 64-bit mode at `entry`.
///
/// # Errors
/// [`RegisterError::Kvm`].
pub fn set_boot_state(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegisterError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|e| RegisterError::Kvm("KVM_GET_SREGS", e))?;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_DS,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: BOOT_CS,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = layout::PML4.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
        .map_err(|e| RegisterError::Kvm("KVM_SET_SREGS", e))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE.0,
        rsp: layout::BOOT_STACK.0,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(|e| RegisterError::Kvm("KVM_SET_REGS", e))
}
