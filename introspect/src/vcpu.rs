//! The registers of a stopped vCPU that introspection needs, as plain data.
//!
//! This module knows nothing of KVM: a VMM fills them in from its hypervisor, a core file from its
//! notes.

use serde::Serialize;

/// The registers of one vCPU at the moment it stopped.
///
/// More registers may be added: make one with [`Default`] and assign its fields.
///
/// ```
/// let mut regs = introspect::VcpuRegs::default();
/// regs.index = 1;
/// regs.rip = 0xffff_ffff_8100_0000;
/// regs.online = true;
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // Most fields are registers under the architecture's names.
pub struct VcpuRegs {
    /// Index of the vCPU in the VMM, from 0; also its APIC id in the guest.
    pub index: u32,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub kernel_gs_base: u64,
    pub lstar: u64,
    pub idt_base: u64,
    pub idt_limit: u16,
    /// `MSR_IA32_FRED_CONFIG`; `None` unless FRED is enabled on the vCPU.
    pub fred_config: Option<u64>,
    /// Whether the vCPU has been started. If not, it waits for INIT/SIPI and its registers say
    /// nothing about the kernel.
    pub online: bool,
    /// Whether the vCPU waits in HLT for an interrupt. False, too, where that is not known: in core
    /// files of QEMU, for example.
    pub halted: bool,
    /// Whether the vCPU runs a nested guest or is in SMM: these registers are then not those of the
    /// guest's kernel.
    pub foreign: bool,
}
