//! The two things in a vCPU's `kvm_run` page that kvm-ioctls has no safe way to: `immediate_exit` from another thread, and what
//! KVM says of an internal error. One of the two modules with `unsafe`.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::{KvmRunWrapper, VcpuFd, VmFd};

/// `kvm_run.immediate_exit` of one vCPU, through a mapping of its own that outlives the vCPU thread.
///
/// While it is set, `KVM_RUN` completes pending I/O and returns `EINTR` instead of entering the guest. A kick is three steps, in
/// this order: put the command where the vCPU thread looks, [`set`](Self::set), signal the thread. The thread first
/// [`clear`](Self::clear)s, then looks for commands, then enters `KVM_RUN`: whichever way the two interleave, it sees the
/// command, or the flag, or the signal ends `KVM_RUN`. `clear` must be a full barrier for that (a plain store could still be in
/// the store buffer when the look for commands has found none, and then wipe out a `set` that came between), so it is a swap.
#[derive(Debug)]
pub struct ImmediateExit {
    flag: NonNull<AtomicU8>,
    /// Keeps `flag` mapped.
    _mapping: KvmRunWrapper,
}

// SAFETY: `flag` points into a shared mapping that `_mapping` owns and that moves with it; it is only ever used as an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: As above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`, a vCPU of `vm`.
    ///
    /// # Errors
    /// When the vCPU's page cannot be mapped again.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd) -> Result<ImmediateExit, kvm_ioctls::Error> {
        let mut mapping = KvmRunWrapper::mmap_from_fd(vcpu, vm.run_size())?;
        let flag = NonNull::from(&mut mapping.as_mut_ref().immediate_exit).cast();
        Ok(ImmediateExit {
            flag,
            _mapping: mapping,
        })
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: The pointer comes from a reference to a byte inside the mapping, which lives as long as `self`. AtomicU8 has
        // the layout of u8, and through this mapping the byte is accessed as an atomic only.
        unsafe { self.flag.as_ref() }
    }

    /// The next `KVM_RUN`, or the present one once signalled, does not enter the guest.
    pub fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// `KVM_RUN` enters the guest again. A full barrier: see the type.
    pub fn clear(&self) {
        self.flag().swap(0, Ordering::SeqCst);
    }
}

/// What KVM says of the internal error that `vcpu` just stopped with: the suberror and its data words.
pub fn internal_error(vcpu: &mut VcpuFd) -> Option<(u32, Vec<u64>)> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: The exit reason says that this member of the union is the valid one, and any bits are valid in its integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(0);
    let data = internal.data.iter().take(count).copied().collect();
    Some((internal.suberror, data))
}
