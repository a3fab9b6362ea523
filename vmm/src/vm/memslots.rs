//! KVM's memory slots: which host memory is guest memory at which guest-physical address, and which
//! page size the host should use for it. This is one of the two modules of this crate with
//! `unsafe`; the other is `kvm_run`.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// The memory slots of one VM. Owns a share of every mapping that was added by
/// [`add`](Self::add).
#[derive(Debug, Default)]
pub struct Memslots {
    /// The lowest slot number that was never used.
    next: u32,
    /// Numbers of slots that were removed.
    free: Vec<u32>,
    /// Slot number and mapping of each region that was added, by guest-physical address.
    by_gpa: BTreeMap<u64, (u32, Arc<GuestRegionMmap>)>,
}

impl Memslots {
    /// Adds a slot for each region of `ram`. KVM keeps the host addresses, so `ram` must live for
    /// as long as `vm` can run. It does, because the VM owns both.
    ///
    /// # Errors
    /// KVM's error for the first region that it refused.
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

    /// Adds a slot for one more region.
    ///
    /// # Errors
    /// KVM's error; the guest does not have the region then.
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

    /// Start and length in bytes of the regions added by [`add`](Self::add), in order of address.
    pub fn added(&self) -> impl Iterator<Item = (u64, u64)> {
        self.by_gpa
            .iter()
            .map(|(gpa, (_, region))| (*gpa, region.len()))
    }

    /// Removes the slot of the region that [`add`](Self::add) added at `gpa`. `None`: there is
    /// none.
    ///
    /// # Errors
    /// KVM's error; the guest keeps the region then.
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

/// Advises the host to back guest memory with 2 MiB pages where it can. The guest's and the host's
/// page tables are then walked less, which shortens pauses, in which much memory is read once.
/// Without large pages (`transparent_hugepage` is `never`) the guest works as well.
///
/// The VMM does this for every guest; it is public for tests that read and time a guest's memory
/// from a core file in the same way.
pub fn prefer_large_pages(ram: &GuestMemoryMmap) {
    for region in ram.iter() {
        let Ok(len) = usize::try_from(region.len()) else {
            continue;
        };
        // SAFETY: The range is one live mapping of `ram`. The advice changes neither what is mapped
        // nor its contents.
        let advised = unsafe { libc::madvise(region.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        if advised != 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "guest memory has small pages only");
        }
    }
}

/// Defines or redefines slot `number`; length 0 deletes it.
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
    // SAFETY: `host` is the start of a live mapping of `len` bytes that the guest may share
    // (vm-memory accesses it as volatile memory only). The mapping outlives its slot: RAM is owned
    // by the VM together with its KVM handle and dropped after its vCPU threads were joined, and
    // any other region is owned by `Memslots` until KVM has confirmed the deletion of the slot.
    unsafe { vm.set_user_memory_region(slot) }
}
