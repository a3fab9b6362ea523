//! Memory slots: which host memory KVM lets the guest use at which guest-physical address, and what pages the host makes it of.
//! The other module with `unsafe`.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// The memory slots of one VM. Owns a share of every mapping that it has given to KVM.
#[derive(Debug, Default)]
pub struct Memslots {
    next: u32,
    /// Numbers of slots that were given back.
    free: Vec<u32>,
    by_gpa: BTreeMap<u64, (u32, Arc<GuestRegionMmap>)>,
}

impl Memslots {
    /// Gives all of `ram` to the guest. KVM keeps the host addresses: `ram` must be kept for as long as `vm` can run, and is,
    /// because the VM owns both.
    ///
    /// # Errors
    /// What KVM said, for the first region that it refused.
    pub fn add_ram(&mut self, vm: &VmFd, ram: &GuestMemoryMmap) -> Result<(), kvm_ioctls::Error> {
        for region in ram.iter() {
            let number = self.next;
            register(
                vm,
                number,
                region.start_addr(),
                region.len(),
                region.as_ptr(),
            )?;
            self.next += 1;
        }
        Ok(())
    }

    /// Gives one more region to the guest.
    ///
    /// # Errors
    /// What KVM said.
    pub fn add(
        &mut self,
        vm: &VmFd,
        region: Arc<GuestRegionMmap>,
    ) -> Result<(), kvm_ioctls::Error> {
        let number = self.free.pop().unwrap_or(self.next);
        register(
            vm,
            number,
            region.start_addr(),
            region.len(),
            region.as_ptr(),
        )?;
        if number == self.next {
            self.next += 1;
        }
        self.by_gpa
            .insert(region.start_addr().raw_value(), (number, region));
        Ok(())
    }

    /// The regions that came by [`add`](Self::add): start and length, in order of address.
    pub fn added(&self) -> impl Iterator<Item = (u64, u64)> {
        self.by_gpa
            .iter()
            .map(|(gpa, (_, region))| (*gpa, region.len()))
    }

    /// Takes the region at `gpa`, which came by [`add`](Self::add), away from the guest. `None`: there is none.
    ///
    /// # Errors
    /// What KVM said; the guest keeps the region then.
    pub fn remove(
        &mut self,
        vm: &VmFd,
        gpa: GuestAddress,
    ) -> Result<Option<Arc<GuestRegionMmap>>, kvm_ioctls::Error> {
        let Some((number, region)) = self.by_gpa.get(&gpa.raw_value()) else {
            return Ok(None);
        };
        register(vm, *number, gpa, 0, region.as_ptr())?;
        self.free.push(*number);
        Ok(self
            .by_gpa
            .remove(&gpa.raw_value())
            .map(|(_, region)| region))
    }
}

/// Asks the host to make guest memory of 2 MiB pages where it can: the guest's tables and ours are then walked less, and so is the
/// pause shorter, in which much memory is looked at once. A host that has none (`transparent_hugepage` is `never`) goes on without.
pub fn prefer_large_pages(ram: &GuestMemoryMmap) {
    for region in ram.iter() {
        let Ok(len) = usize::try_from(region.len()) else {
            continue;
        };
        // SAFETY: the range is one live mapping of `ram`; the advice changes neither what is mapped nor what stands there.
        let advised = unsafe { libc::madvise(region.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        if advised != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "guest memory of small pages only");
        }
    }
}

/// (Re)defines slot `number`; length 0 deletes it.
fn register(
    vm: &VmFd,
    number: u32,
    gpa: GuestAddress,
    len: u64,
    host: *mut u8,
) -> Result<(), kvm_ioctls::Error> {
    let slot = kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: gpa.raw_value(),
        memory_size: len,
        userspace_addr: host as u64,
    };
    // SAFETY: `host` is the start of a live mapping of `len` bytes that is Rust's to share (vm-memory accesses it as volatile
    // memory only). The mapping outlives its slot: RAM is owned by the VM beside its KVM handle and dropped after its vCPU
    // threads were joined, and any other region is owned by `Memslots` until KVM has confirmed the deletion of the slot.
    unsafe { vm.set_user_memory_region(slot) }
}
