//! The two parts of a vCPU's `kvm_run` page to which kvm-ioctls gives no safe access:
//! `immediate_exit` from another thread, and the data of an internal error. This is one of the two
//! modules of this crate with `unsafe`; the other is `memslots`.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::{KvmRunWrapper, VcpuFd, VmFd};

/// `kvm_run.immediate_exit` of one vCPU, through a mapping of its own that outlives the vCPU
/// thread.
///
/// While it is set, `KVM_RUN` completes pending I/O and returns `EINTR` instead of entering the
/// guest. A kick has three steps, in this order: send the command, [`set`](Self::set), signal the
/// thread. The thread first [`clear`](Self::clear)s, then checks for commands, then calls
/// `KVM_RUN`. However the two interleave, the thread sees the command, or `KVM_RUN` sees the flag,
/// or the signal ends `KVM_RUN`. For that, `clear` must be a full barrier, so it is a swap: a plain
/// store could still be in the store buffer while the check finds no command, and then overwrite a
/// `set` that came in between.
#[derive(Debug)]
pub struct ImmediateExit {
    flag: NonNull<AtomicU8>,
    /// Keeps `flag` mapped.
    _mapping: KvmRunWrapper,
}

// SAFETY: `flag` points into a shared mapping that `_mapping` owns and that moves with it; it is
// only ever used as an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: As above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`, a vCPU of `vm`.
    ///
    /// # Errors
    /// When the vCPU's `kvm_run` page cannot be mapped a second time.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd) -> Result<ImmediateExit, kvm_ioctls::Error> {
        let mut mapping = KvmRunWrapper::mmap_from_fd(vcpu, vm.run_size())?;
        let flag = NonNull::from(&mut mapping.as_mut_ref().immediate_exit).cast();
        Ok(ImmediateExit {
            flag,
            _mapping: mapping,
        })
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: The pointer comes from a reference to a byte inside the mapping, which lives as
        // long as `self`. AtomicU8 has the layout of u8, and through this mapping the byte is
        // accessed as an atomic only.
        unsafe { self.flag.as_ref() }
    }

    /// The next `KVM_RUN`, or the current one once its thread is signalled, returns without
    /// entering the guest.
    pub fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// The next `KVM_RUN` enters the guest. This is a full barrier: see the type.
    pub fn clear(&self) {
        self.flag().swap(0, Ordering::SeqCst);
    }
}

/// The suberror and data words of the internal error with which `vcpu` just left `KVM_RUN`. `None`:
/// it did not leave with one.
pub fn internal_error(vcpu: &mut VcpuFd) -> Option<(u32, Vec<u64>)> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: By the exit reason this member of the union is the valid one, and any bits are valid
    // in its integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(0);
    let data = internal.data.iter().take(count).copied().collect();
    Some((internal.suberror, data))
}
