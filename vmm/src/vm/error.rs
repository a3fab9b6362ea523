//! Why a machine cannot be built, given hidden memory or paused, and how the last two reach the
//! patcher as [`MachineError`].
//!
//! This module knows KVM's errors; it must not know how a guest is started or how it ended (that is
//! `crate::error`).

use std::io;
use std::time::Duration;

use patcher::MachineError;
use vm_memory::mmap::FromRangesError;

use crate::vm::cpuid::CpuidError;
use crate::vm::regs::RegsError;

/// Why the machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no `/dev/kvm`.
    #[error(
        "no /dev/kvm: load kvm_amd or kvm_intel (and switch virtualization on in the firmware)"
    )]
    NoKvm,
    /// `/dev/kvm` exists, but this process may not open it.
    #[error("no permission to open /dev/kvm: join the group that owns it (usually `kvm`)")]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// The module that serves `/dev/kvm` cannot run a stock kernel.
    #[error(
        "/dev/kvm cannot run a stock kernel here: neither kvm_amd nor kvm_intel is loaded{}",
        served_by(modules)
    )]
    NotServing {
        /// The kvm modules that are loaded instead.
        modules: Vec<String>,
    },
    /// KVM lacks a capability that the machine needs.
    #[error("/dev/kvm lacks {0}: a newer host kernel is needed")]
    Lacks(&'static str),
    /// KVM refused the named call.
    #[error("{0} failed")]
    Call(&'static str, #[source] kvm_ioctls::Error),
    /// No guest can have this amount of RAM.
    #[error("cannot allocate {} MiB of guest memory: {why}", size >> 20)]
    MemorySize {
        /// Bytes of RAM requested.
        size: u64,
        /// Which rule the size breaks.
        why: String,
    },
    /// The host cannot map the guest's RAM.
    #[error("cannot allocate {} MiB of guest memory: {error}", size >> 20)]
    Memory {
        /// Bytes of RAM requested.
        size: u64,
        /// The host's error. It names its own cause, so it is text here and no `source()`.
        error: FromRangesError,
    },
    /// The CPUID leaves of the vCPUs cannot be made.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The process cannot have another eventfd.
    #[error("cannot create an eventfd")]
    EventFd(#[source] io::Error),
}

fn served_by(modules: &[String]) -> String {
    if modules.is_empty() {
        String::new()
    } else {
        format!(" (it is served by {})", modules.join(", "))
    }
}

/// Why hidden memory cannot be added or removed. [`MachineError`] takes it as text, so each
/// message names its cause.
#[derive(Debug, thiserror::Error)]
pub enum HiddenError {
    /// The length is 0 or not a multiple of 2 MiB.
    #[error("a length of {0:#x} bytes is 0 or not a multiple of 2 MiB")]
    Length(u64),
    /// The guest-physical address space, or the limit on hidden memory, is used up.
    #[error("no space for {0:#x} more bytes")]
    Exhausted(u64),
    /// The host cannot map the memory.
    #[error("{0}")]
    Map(FromRangesError),
    /// KVM refused the memory slot.
    #[error("KVM_SET_USER_MEMORY_REGION: {0}")]
    Slot(kvm_ioctls::Error),
    /// Other hidden memory is at this guest-physical address.
    #[error("other hidden memory is at {0:#x} already")]
    InUse(u64),
    /// There is no hidden memory at this guest-physical address.
    #[error("no hidden memory at {0:#x}")]
    Unknown(u64),
}

impl From<HiddenError> for MachineError {
    fn from(error: HiddenError) -> MachineError {
        MachineError::HiddenMemory(error.to_string())
    }
}

/// Why the vCPUs cannot be stopped, resumed or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// The vCPU threads have ended, and the guest with them.
    #[error("the guest has ended")]
    GuestEnded,
    /// A vCPU thread does not answer.
    #[error("vCPU {vcpu} has not stopped within {waited:?}")]
    NoAnswer {
        /// Index of the vCPU.
        vcpu: u32,
        /// How long the pause waited for it.
        waited: Duration,
    },
    /// The caller resumed more often than it paused, or read registers without a pause.
    #[error("the vCPUs are not paused")]
    NotPaused,
    /// The registers of a stopped vCPU cannot be read.
    #[error(transparent)]
    Unreadable(#[from] RegsError),
}

impl From<PauseError> for MachineError {
    fn from(error: PauseError) -> MachineError {
        MachineError::Vcpu(error.to_string())
    }
}
