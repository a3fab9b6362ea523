//! Which kernel a guest is running: it can start another one by itself (kexec, or a crash kernel),
//! and both are then in its memory.
//!
//! A kernel that is started with fewer CPUs (`maxcpus=`, `nr_cpus=`) leaves the other vCPUs where
//! the old kernel halted them with interrupts off (`arch/x86/kernel/process.c: stop_this_cpu`,
//! `arch/x86/kernel/reboot.c: crash_nmi_callback`). Their registers lead to the old kernel, and say
//! nothing about the kernel in use. This module knows which vCPUs run a kernel; it must not know
//! what is in a kernel.

use crate::kernel::halted::is_halted_permanently;
use crate::kernel::{Kernel, MAX_BANNER};
use crate::memory::kernel::KernelMemory;
use crate::memory::paging::AddressSpace;
use crate::vcpu::VcpuRegs;

impl Kernel {
    /// Whether the guest still runs this kernel, of this boot, as far as can be seen: a guest can
    /// start another one by itself (kexec). The old one may then lie unchanged in memory, but no
    /// vCPU enters it again. vCPUs that are [parked](Self::parked_vcpus) do not count, as long as
    /// another one runs this kernel. A few reads, no lock.
    #[must_use]
    pub fn is_running(&self, memory: &KernelMemory<'_>, vcpus: &[VcpuRegs]) -> bool {
        let same_boot = self
            .boot_canary
            .is_none_or(|(at, canary)| memory.u64(at) == Ok(canary));
        let banner = self.symbols.address("linux_banner").ok();
        let banner = banner.and_then(|at| memory.cstr(at, MAX_BANNER).ok());
        same_boot
            && banner.is_some_and(|banner| banner.trim_end() == self.banner)
            && self.is_run_by(memory, vcpus)
    }

    /// Whether these vCPUs run this kernel: each may run it or is parked, and not all are parked.
    /// (If every vCPU is halted permanently, nothing shows which kernel was in use last, and each
    /// that has a vCPU counts as running.)
    fn is_run_by(&self, memory: &KernelMemory<'_>, vcpus: &[VcpuRegs]) -> bool {
        let is_halted = |vcpu: &&VcpuRegs| is_halted_permanently(memory.phys(), vcpu);
        let online = vcpus.iter().filter(|vcpu| vcpu.online && !vcpu.foreign);
        let (own, others): (Vec<_>, Vec<_>) =
            online.partition(|vcpu| self.may_be_run_by(memory, vcpu));
        others.is_empty() || !own.is_empty() && others.iter().all(is_halted)
    }

    /// The vCPUs that are halted permanently in another kernel, by index: this kernel has not
    /// started them. A few reads for each vCPU.
    #[must_use]
    pub fn parked_vcpus(&self, memory: &KernelMemory<'_>, vcpus: &[VcpuRegs]) -> Vec<u32> {
        let online = vcpus.iter().filter(|vcpu| vcpu.online && !vcpu.foreign);
        let others = online.filter(|vcpu| !self.may_be_run_by(memory, vcpu));
        let parked = others.filter(|vcpu| is_halted_permanently(memory.phys(), vcpu));
        parked.map(|vcpu| vcpu.index).collect()
    }

    /// Whether a vCPU's system calls enter this kernel, and its page tables map this image, where
    /// they map one at all.
    fn may_be_run_by(&self, memory: &KernelMemory<'_>, vcpu: &VcpuRegs) -> bool {
        let entry = self.symbols.address("entry_SYSCALL_64");
        // Early in boot and with FRED there is no system call entry, and the vCPU says nothing.
        let enters = vcpu.lstar == 0 || entry.is_ok_and(|entry| entry.0 == vcpu.lstar);
        let Some(space) = AddressSpace::of_vcpu(vcpu) else {
            return enters;
        };
        let mut images = [space.kernel_half(), space]
            .into_iter()
            .filter_map(|space| space.translate(memory.phys(), self.base).ok())
            .map(|mapping| mapping.gpa)
            .peekable();
        enters && (images.peek().is_none() || images.any(|image| image == self.phys))
    }
}
