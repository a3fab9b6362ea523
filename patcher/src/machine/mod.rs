//! The machine as the patcher sees it: vCPUs that stop and go, registers, guest-physical writes, one interrupt line per vCPU.
//!
//! This is the narrow trait through which every effect on the guest passes. It knows nothing of patches; the VMM implements it
//! over KVM, and a recording mock implements it for the fault-injection tests.

#[cfg(test)]
pub mod mock;
pub mod read_only;

use introspect::{PhysMemory, VcpuRegs};
use vm_memory::GuestAddress;

/// What went wrong in the machine; the text is the machine's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// The vCPUs could not be stopped, read or started.
    #[error("vCPU: {0}")]
    Vcpu(String),
    /// A write missed guest memory.
    #[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
    Memory {
        /// Where the write began.
        gpa: GuestAddress,
        /// How many bytes.
        len: usize,
    },
    /// The hypervisor refused to give the guest more memory.
    #[error("hidden memory: {0}")]
    HiddenMemory(String),
    /// The interrupt could not be sent.
    #[error("interrupt: {0}")]
    Interrupt(String),
}

/// A running guest, seen from outside.
pub trait Machine {
    /// Guest-physical memory, readable; includes hidden memory once added.
    type Memory: PhysMemory;

    /// The guest's memory.
    fn memory(&self) -> &Self::Memory;

    /// Stops every vCPU outside guest mode, with no I/O exit pending. Nests: each `pause` needs its [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`MachineError::Vcpu`]; no vCPU stays stopped.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Undoes one [`pause`](Self::pause); the last one lets the vCPUs run, each after a serialising event.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`].
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Registers of every vCPU, in order of index. Only while paused.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`], also when the vCPUs run.
    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError>;

    /// Writes guest-physical memory, past any guest page protection. Only while paused, except into hidden memory.
    ///
    /// # Errors
    /// [`MachineError::Memory`] with nothing written when the range is not all guest memory.
    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError>;

    /// Adds `len` bytes (a multiple of 2 MiB) of zeroed memory that the guest's memory map does not name, at a 2 MiB aligned
    /// address above its RAM and below its physical address width.
    ///
    /// # Errors
    /// [`MachineError::HiddenMemory`].
    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError>;

    /// Gives back memory got from [`add_hidden_memory`](Self::add_hidden_memory). The caller vouches that the guest no longer maps it.
    ///
    /// # Errors
    /// [`MachineError::HiddenMemory`].
    fn remove_hidden_memory(&mut self, gpa: GuestAddress) -> Result<(), MachineError>;

    /// Sends interrupt `vector` to vCPU `index`, fixed delivery, edge. Of one that is stopped it is pending, and taken when it runs.
    ///
    /// # Errors
    /// [`MachineError::Interrupt`].
    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError>;
}
