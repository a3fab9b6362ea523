//! [`Machine`]: the running guest as the patcher sees it.
//!
//! This narrow trait is the only way to affect a guest: vCPUs that pause and resume, their
//! registers, writes to guest-physical memory, hidden memory, interrupts. It knows nothing of
//! patches. The VMM implements it with KVM; a mock that records every operation implements it for
//! unit tests.

#[cfg(test)]
pub mod mock;
pub mod read_only;

use introspect::{PhysMemory, VcpuRegs};
use vm_memory::GuestAddress;

/// Why an operation of the machine failed; the text is the machine's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// The vCPUs could not be paused, read or resumed.
    #[error("cannot stop, read or resume the vCPUs: {0}")]
    Vcpu(String),
    /// A write missed guest memory.
    #[error("no guest memory at physical {:#x}..+{len:#x}", gpa.0)]
    Memory {
        /// The guest-physical address at which the write began.
        gpa: GuestAddress,
        /// The length of the write, in bytes.
        len: usize,
    },
    /// Hidden memory could not be added or removed.
    #[error("hidden memory: {0}")]
    HiddenMemory(String),
    /// The interrupt could not be sent.
    #[error("interrupt: {0}")]
    Interrupt(String),
}

/// A running guest, seen from outside.
pub trait Machine {
    /// Guest-physical memory for reading; includes hidden memory that was added.
    type Memory: PhysMemory;

    /// The guest's memory.
    fn memory(&self) -> &Self::Memory;

    /// Whether the guest never runs again, as one in a core file: trying again shows the same.
    fn never_runs(&self) -> bool {
        false
    }

    /// Stops every vCPU outside guest mode, with no I/O exit pending. Nests: each `pause` needs its
    /// own [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`MachineError::Vcpu`]; no vCPU stays stopped by this call.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Undoes one [`pause`](Self::pause). The last one lets the vCPUs run, each after a serializing
    /// event.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`].
    fn resume(&mut self) -> Result<(), MachineError>;

    /// The registers of every vCPU, in order of index. Only while paused.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`], also when the vCPUs are running.
    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError>;

    /// Writes guest-physical memory, whatever the guest's page protection. Only while paused,
    /// except into hidden memory.
    ///
    /// # Errors
    /// [`MachineError::Memory`] with nothing written when the range is not all guest memory.
    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError>;

    /// Adds `len` bytes (a multiple of 2 MiB) of zeroed memory that the guest's memory map does not
    /// name, at a 2 MiB aligned address above its RAM and within its physical address width.
    ///
    /// # Errors
    /// [`MachineError::HiddenMemory`].
    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError>;

    /// Removes memory that [`add_hidden_memory`](Self::add_hidden_memory) added. The caller
    /// guarantees that the guest does not map it.
    ///
    /// # Errors
    /// [`MachineError::HiddenMemory`].
    fn remove_hidden_memory(&mut self, gpa: GuestAddress) -> Result<(), MachineError>;

    /// Sends interrupt `vector` to vCPU `index`: fixed delivery, edge-triggered. A vCPU that is
    /// paused takes it when it runs.
    ///
    /// # Errors
    /// [`MachineError::Interrupt`].
    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError>;
}
