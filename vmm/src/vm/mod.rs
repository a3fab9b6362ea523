//! The machine as KVM sees it: memory slots, interrupt controllers, timers, vCPUs. Knows nothing of what the guest runs.

pub mod cpuid;
pub mod error;
pub mod handle;
pub mod kvm_run;
pub mod machine;
pub mod memory;
pub mod memslots;
pub mod regs;
pub mod shared;
pub mod vcpu;
pub mod vcpu_set;

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_msi, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::{self, HIDDEN_UNIT};
use crate::vm::error::{HiddenError, VmError};
use crate::vm::kvm_run::ImmediateExit;
use crate::vm::memory::VmMemory;
use crate::vm::memslots::{Memslots, prefer_large_pages};

/// The most hidden memory that a guest is given, all together.
const HIDDEN_LIMIT: u64 = 1 << 30;

/// Opens `/dev/kvm` and checks that it offers what the machine is made of.
///
/// # Errors
/// [`VmError`] saying what is missing.
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => VmError::NoKvm,
        libc::EACCES | libc::EPERM => VmError::Permission,
        _ => VmError::Open(e),
    })?;
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(VmError::Lacks("API version 12"));
    }
    for (cap, name) in [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Pit2, "an in-kernel PIT"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(VmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// Checks that the module behind `/dev/kvm` runs guest kernels on the processor. Others exist that open and answer, and take
/// minutes over a guest kernel that they then do not finish.
///
/// # Errors
/// [`VmError::NotServing`].
pub fn check_serving() -> Result<(), VmError> {
    let Ok(entries) = std::fs::read_dir("/sys/module") else {
        // Without sysfs nothing is known; KVM itself will say what it cannot do.
        return Ok(());
    };
    let modules: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    if modules
        .iter()
        .any(|name| name == "kvm_amd" || name == "kvm_intel")
    {
        Ok(())
    } else {
        Err(VmError::NotServing { modules })
    }
}

/// A machine.
#[derive(Debug)]
pub struct Vm {
    // Before the memory that it was told of: dropped first.
    fd: VmFd,
    slots: Mutex<Memslots>,
    memory: VmMemory,
    ram_size: u64,
    physical_bits: u8,
    cpus: u8,
}

impl Vm {
    /// A machine with `ram_size` bytes of RAM and the vCPUs' interrupt controllers, and its `cpus` vCPUs.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn new(
        kvm: &Kvm,
        ram_size: u64,
        cpus: u8,
    ) -> Result<(Vm, Vec<(VcpuFd, ImmediateExit)>), VmError> {
        let refused = |call| move |e| VmError::Call(call, e);
        let shared_cpuid = cpuid::shared(kvm, cpus)?;
        let physical_bits = cpuid::physical_bits(&shared_cpuid);
        let memory = map_ram(ram_size, physical_bits)?;
        let fd = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        let mut slots = Memslots::default();
        slots
            .add_ram(&fd, memory.ram())
            .map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(refused("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip()
            .map_err(refused("KVM_CREATE_IRQCHIP"))?;
        // The dummy speaker makes KVM answer port 0x61, by which guests calibrate the TSC against the PIT.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("KVM_CREATE_PIT2"))?;
        let mut vcpus = Vec::new();
        for index in 0..cpus {
            let vcpu = fd
                .create_vcpu(index.into())
                .map_err(refused("KVM_CREATE_VCPU"))?;
            let leaves = cpuid::for_vcpu(&shared_cpuid, index)?;
            vcpu.set_cpuid2(&leaves)
                .map_err(refused("KVM_SET_CPUID2"))?;
            let exit = ImmediateExit::new(&fd, &vcpu).map_err(refused("mmap of kvm_run"))?;
            vcpus.push((vcpu, exit));
        }
        let vm = Vm {
            fd,
            slots: Mutex::new(slots),
            memory,
            ram_size,
            physical_bits,
            cpus,
        };
        Ok((vm, vcpus))
    }

    /// Guest-physical memory.
    #[must_use]
    pub fn memory(&self) -> &VmMemory {
        &self.memory
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// Where hidden memory begins: no RAM is at or above it.
    #[must_use]
    pub fn hidden_base(&self) -> u64 {
        layout::hidden_base(self.ram_size)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// An eventfd that raises interrupt line `gsi` when written.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn irq_line(&self, gsi: u32) -> Result<EventFd, VmError> {
        let line = EventFd::new(libc::EFD_NONBLOCK).map_err(|e| VmError::EventFd(e))?;
        self.fd
            .register_irqfd(&line, gsi)
            .map_err(|e| VmError::Call("KVM_IRQFD", e))?;
        Ok(line)
    }

    /// Sends interrupt `vector` to vCPU `index` as a message-signalled one: fixed, edge, physical destination. Says whether the
    /// vCPU's APIC took it; one that is switched off does not.
    ///
    /// # Errors
    /// What KVM said.
    pub fn interrupt(&self, index: u8, vector: u8) -> Result<bool, kvm_ioctls::Error> {
        let msi = kvm_msi {
            address_lo: layout::LAPIC | u32::from(index) << 12,
            data: vector.into(),
            ..Default::default()
        };
        self.fd.signal_msi(msi).map(|delivered| delivered > 0)
    }

    /// Gives the guest `len` bytes that its memory map does not name, at the lowest free place behind its RAM.
    ///
    /// # Errors
    /// [`HiddenError`].
    pub fn add_hidden(&self, len: u64) -> Result<GuestAddress, HiddenError> {
        if len == 0 || !len.is_multiple_of(HIDDEN_UNIT) {
            return Err(HiddenError::Length(len));
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let used: Vec<(u64, u64)> = slots.added().collect();
        let total: u64 = used.iter().map(|(_, len)| len).sum();
        let gpa = first_gap(self.hidden_base(), &used, len);
        let end = gpa
            .checked_add(len)
            .filter(|end| *end <= 1 << self.physical_bits);
        if end.is_none() || total.saturating_add(len) > HIDDEN_LIMIT {
            return Err(HiddenError::Exhausted(len));
        }
        let gpa = GuestAddress(gpa);
        let size = usize::try_from(len).map_err(|_| HiddenError::Exhausted(len))?;
        let region = GuestRegionMmap::from_range(gpa, size, None).map_err(HiddenError::Map)?;
        let region = Arc::new(region);
        slots
            .add(&self.fd, Arc::clone(&region))
            .map_err(HiddenError::Slot)?;
        if self.memory.insert_hidden(region) {
            Ok(gpa)
        } else {
            let _ = slots.remove(&self.fd, gpa);
            Err(HiddenError::InUse(gpa.0))
        }
    }

    /// Takes memory that [`add_hidden`](Self::add_hidden) gave away again.
    ///
    /// # Errors
    /// [`HiddenError`].
    pub fn remove_hidden(&self, gpa: GuestAddress) -> Result<(), HiddenError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = slots
            .remove(&self.fd, gpa)
            .map_err(HiddenError::Slot)?
            .ok_or(HiddenError::Unknown(gpa.0))?;
        self.memory.remove_hidden(gpa, removed.size() as u64);
        Ok(())
    }
}

fn map_ram(size: u64, physical_bits: u8) -> Result<VmMemory, VmError> {
    let no = |why: String| VmError::MemorySize { size, why };
    if size == 0 {
        return Err(no("a guest needs some".to_owned()));
    }
    if size > (1 << physical_bits) - (layout::HOLE_END.0 - layout::HOLE.0) {
        return Err(no(format!("the processor addresses {physical_bits} bits")));
    }
    if !size.is_multiple_of(4096) {
        return Err(no("it is not a whole number of 4 KiB pages".to_owned()));
    }
    let ranges = layout::ram_ranges(size)
        .into_iter()
        .map(|(start, len)| Ok((start, usize::try_from(len).map_err(|e| no(e.to_string()))?)))
        .collect::<Result<Vec<_>, VmError>>()?;
    let ram =
        GuestMemoryMmap::from_ranges(&ranges).map_err(|error| VmError::Memory { size, error })?;
    prefer_large_pages(&ram);
    Ok(VmMemory::new(ram))
}

/// The lowest address from `base` on where `len` bytes fit between `used`, which is sorted.
fn first_gap(base: u64, used: &[(u64, u64)], len: u64) -> u64 {
    let mut candidate = base;
    for (start, used_len) in used {
        if start.saturating_sub(candidate) >= len {
            break;
        }
        candidate = start.saturating_add(*used_len);
    }
    candidate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_and_used_again() {
        assert_eq!(first_gap(100, &[], 10), 100);
        assert_eq!(first_gap(100, &[(100, 10)], 10), 110);
        assert_eq!(first_gap(100, &[(110, 10)], 10), 100);
        assert_eq!(first_gap(100, &[(100, 10), (115, 10)], 10), 125);
        assert_eq!(first_gap(100, &[(100, 10), (120, 10)], 10), 110);
    }
}
