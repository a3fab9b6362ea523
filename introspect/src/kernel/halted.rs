//! Whether a vCPU is halted for good.
//!
//! This module knows registers and one instruction; it must not know kernels.

use crate::addr::Gva;
use crate::memory::PhysMemory;
use crate::memory::kernel::KernelMemory;
use crate::memory::paging::AddressSpace;
use crate::vcpu::VcpuRegs;

/// RFLAGS.IF: interrupts are on.
const RFLAGS_IF: u64 = 1 << 9;
/// The instruction HLT.
const HLT: u8 = 0xf4;

/// Whether a vCPU is halted in the kernel with interrupts off: only an NMI, an SMI or an INIT makes
/// it continue, or another vCPU that releases a spinlock for which it waits
/// (`arch/x86/kernel/kvm.c: kvm_wait`). A read of one byte, unless the registers say that it is
/// halted.
///
/// Registers from a core file may not say so (`VcpuRegs::halted`). Then it counts as halted when
/// the instruction before the next one is HLT.
#[must_use]
pub fn is_halted_permanently(phys: &dyn PhysMemory, vcpu: &VcpuRegs) -> bool {
    let can_be = vcpu.online && !vcpu.foreign && vcpu.cpl == 0 && vcpu.rflags & RFLAGS_IF == 0;
    let at_hlt = || {
        let space = AddressSpace::of_vcpu(vcpu)?;
        let memory = KernelMemory::new(phys, space);
        memory.u8(Gva(vcpu.rip).sub(1)).ok()
    };
    can_be && (vcpu.halted || at_hlt() == Some(HLT))
}
