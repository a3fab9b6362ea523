//! The virtual machine over KVM: memory slots, interrupt controllers, timers, vCPUs and their
//! threads, and the handles by which other threads pause, read and change it.
//!
//! This module knows KVM; it must not know what the guest runs, how it was loaded, or which devices
//! it has (it is given their buses).

pub mod console_stall;
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

use kvm_bindings::{
    KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::{self, HIDDEN_UNIT};
use crate::vm::error::{HiddenError, VmError};
use crate::vm::kvm_run::ImmediateExit;
use crate::vm::memory::VmMemory;
use crate::vm::memslots::{Memslots, prefer_large_pages};
use introspect::x86::PAGE_SIZE;

/// How many bytes of hidden memory one guest can have in all.
const MAX_HIDDEN: u64 = 1 << 30;

/// Opens `/dev/kvm` and checks that it has every capability that the machine needs.
///
/// # Errors
/// [`VmError::NoKvm`], [`VmError::Permission`], [`VmError::Open`], [`VmError::Lacks`].
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

/// Checks that the module that serves `/dev/kvm` runs guest kernels on the processor. Other modules
/// exist that open and answer, but take minutes to boot a kernel and then do not finish.
///
/// # Errors
/// [`VmError::NotServing`].
pub fn check_serving() -> Result<(), VmError> {
    let Ok(entries) = std::fs::read_dir("/sys/module") else {
        // Without sysfs the modules are unknown; KVM itself reports what it cannot do.
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

/// A virtual machine: its KVM handle and its guest-physical memory.
#[derive(Debug)]
pub struct Vm {
    // Before `memory`, because it is dropped first: KVM holds the addresses of that memory.
    fd: VmFd,
    memslots: Mutex<Memslots>,
    memory: VmMemory,
    ram_size: u64,
    physical_bits: u8,
    cpus: u8,
}

impl Vm {
    /// Creates a VM with `ram_size` bytes of RAM and in-kernel interrupt controllers, and its
    /// `cpus` vCPUs in order of their indices.
    ///
    /// # Errors
    /// [`VmError`]: the host cannot map the RAM, or KVM refuses a call.
    pub fn new(
        kvm: &Kvm,
        ram_size: u64,
        cpus: u8,
    ) -> Result<(Vm, Vec<(VcpuFd, ImmediateExit)>), VmError> {
        let shared_cpuid = cpuid::shared(kvm, cpus)?;
        let physical_bits = cpuid::physical_bits(&shared_cpuid);
        let memory = map_ram(ram_size, physical_bits)?;
        let fd = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        let mut memslots = Memslots::default();
        memslots
            .add_ram(&fd, memory.ram())
            .map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
        create_interrupt_controllers(&fd)?;
        let vcpus = (0..cpus)
            .map(|index| create_vcpu(&fd, index, &shared_cpuid))
            .collect::<Result<_, _>>()?;
        let vm = Vm {
            fd,
            memslots: Mutex::new(memslots),
            memory,
            ram_size,
            physical_bits,
            cpus,
        };
        Ok((vm, vcpus))
    }

    /// The guest-physical memory.
    #[must_use]
    pub fn memory(&self) -> &VmMemory {
        &self.memory
    }

    /// The size of the guest's RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// The guest-physical address at which hidden memory begins: no RAM is at or above it.
    #[must_use]
    pub fn hidden_base(&self) -> u64 {
        layout::hidden_base(self.ram_size)
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// An eventfd that raises interrupt line `gsi` when it is written to.
    ///
    /// # Errors
    /// [`VmError::EventFd`], [`VmError::Call`].
    pub fn irq_line(&self, gsi: u32) -> Result<EventFd, VmError> {
        let line = EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::EventFd)?;
        self.fd
            .register_irqfd(&line, gsi)
            .map_err(refused("KVM_IRQFD"))?;
        Ok(line)
    }

    /// Sends interrupt `vector` to vCPU `index` as a message-signalled interrupt: fixed delivery,
    /// edge-triggered, physical destination. False: the vCPU's APIC did not accept it, because it
    /// is switched off.
    ///
    /// # Errors
    /// The error of `KVM_SIGNAL_MSI`.
    pub fn interrupt(&self, index: u8, vector: u8) -> Result<bool, kvm_ioctls::Error> {
        let msi = kvm_msi {
            address_lo: layout::LAPIC | u32::from(index) << 12,
            data: vector.into(),
            ..Default::default()
        };
        self.fd.signal_msi(msi).map(|delivered| delivered > 0)
    }

    /// Adds `len` bytes of guest-physical memory that the guest's memory map does not list, at the
    /// lowest free address past its RAM.
    ///
    /// # Errors
    /// [`HiddenError`], all but [`HiddenError::Unknown`].
    pub fn add_hidden(&self, len: u64) -> Result<GuestAddress, HiddenError> {
        if len == 0 || !len.is_multiple_of(HIDDEN_UNIT) {
            return Err(HiddenError::Length(len));
        }
        let mut memslots = self.memslots.lock().unwrap_or_else(PoisonError::into_inner);
        let used: Vec<(u64, u64)> = memslots.added().collect();
        let total: u64 = used.iter().map(|(_, len)| len).sum();
        let gpa = first_gap(self.hidden_base(), &used, len);
        let end = gpa
            .checked_add(len)
            .filter(|end| *end <= 1 << self.physical_bits);
        if end.is_none() || total.saturating_add(len) > MAX_HIDDEN {
            return Err(HiddenError::Exhausted(len));
        }
        let gpa = GuestAddress(gpa);
        let size = usize::try_from(len).map_err(|_| HiddenError::Exhausted(len))?;
        let region = GuestRegionMmap::from_range(gpa, size, None).map_err(HiddenError::Map)?;
        let region = Arc::new(region);
        memslots
            .add(&self.fd, Arc::clone(&region))
            .map_err(HiddenError::Slot)?;
        if self.memory.insert_hidden(region) {
            Ok(gpa)
        } else {
            let _ = memslots.remove(&self.fd, gpa);
            Err(HiddenError::InUse(gpa.0))
        }
    }

    /// Removes the memory that [`add_hidden`](Self::add_hidden) has added at `gpa`.
    ///
    /// # Errors
    /// [`HiddenError::Unknown`], [`HiddenError::Slot`].
    pub fn remove_hidden(&self, gpa: GuestAddress) -> Result<(), HiddenError> {
        let mut memslots = self.memslots.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = memslots
            .remove(&self.fd, gpa)
            .map_err(HiddenError::Slot)?
            .ok_or(HiddenError::Unknown(gpa.0))?;
        self.memory.remove_hidden(gpa, removed.size() as u64);
        Ok(())
    }
}

/// Makes the error of a call that KVM refused.
fn refused(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Call(name, error)
}

/// Places KVM's own memory and creates the in-kernel interrupt controllers and the PIT, before any
/// vCPU is created.
fn create_interrupt_controllers(vm: &VmFd) -> Result<(), VmError> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(refused("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(refused("KVM_CREATE_IRQCHIP"))?;
    // With the dummy speaker KVM answers port 0x61, with which guests calibrate the TSC against
    // the PIT.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(refused("KVM_CREATE_PIT2"))
}

/// Creates vCPU `index` with its CPUID, and maps its [`ImmediateExit`].
fn create_vcpu(
    vm: &VmFd,
    index: u8,
    shared_cpuid: &[kvm_cpuid_entry2],
) -> Result<(VcpuFd, ImmediateExit), VmError> {
    let vcpu = vm
        .create_vcpu(index.into())
        .map_err(refused("KVM_CREATE_VCPU"))?;
    let leaves = cpuid::for_vcpu(shared_cpuid, index)?;
    vcpu.set_cpuid2(&leaves)
        .map_err(refused("KVM_SET_CPUID2"))?;
    let exit = ImmediateExit::new(vm, &vcpu).map_err(refused("mmap of kvm_run"))?;
    Ok((vcpu, exit))
}

/// Maps `size` bytes of RAM for a guest whose processor has `physical_bits` address bits.
fn map_ram(size: u64, physical_bits: u8) -> Result<VmMemory, VmError> {
    let invalid = |why: String| VmError::MemorySize { size, why };
    if size == 0 {
        return Err(invalid("a guest needs some".to_owned()));
    }
    if size > (1 << physical_bits) - (layout::HOLE_END.0 - layout::HOLE.0) {
        return Err(invalid(format!(
            "the processor addresses {physical_bits} bits"
        )));
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(invalid(
            "it is not a whole number of 4 KiB pages".to_owned(),
        ));
    }
    let ranges = layout::ram_ranges(size)
        .into_iter()
        .map(|(start, len)| {
            Ok((
                start,
                usize::try_from(len).map_err(|e| invalid(e.to_string()))?,
            ))
        })
        .collect::<Result<Vec<_>, VmError>>()?;
    let ram =
        GuestMemoryMmap::from_ranges(&ranges).map_err(|error| VmError::Memory { size, error })?;
    prefer_large_pages(&ram);
    Ok(VmMemory::new(ram))
}

/// The lowest address, from `base` on, at which `len` bytes overlap none of the `used` ranges
/// (start and length, in order of address).
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
