//! [`patcher::Machine`] over KVM: how the patcher, and introspection with it, pauses, reads and
//! writes a running machine.
//!
//! This module knows pauses, guest-physical memory and interrupts; it must not know what the
//! patcher does with them.

use std::sync::Arc;

use introspect::VcpuRegs;
use patcher::{Machine, MachineError};
use vm_memory::GuestAddress;

use crate::vm::error::PauseError;
use crate::vm::memory::VmMemory;
use crate::vm::shared::Shared;

/// The patcher's handle on a running machine, for any thread but a vCPU's.
///
/// Each handle counts its own pauses and releases those that it still holds when it is dropped, so
/// that a caller that fails half-way does not leave the guest paused. A clone starts with none.
#[derive(Debug)]
pub struct VmMachine {
    shared: Arc<Shared>,
    memory: VmMemory,
    pauses: u32,
}

impl VmMachine {
    pub(crate) fn new(shared: Arc<Shared>) -> VmMachine {
        let memory = shared.vm.memory().clone();
        VmMachine {
            shared,
            memory,
            pauses: 0,
        }
    }
}

impl Clone for VmMachine {
    fn clone(&self) -> Self {
        VmMachine::new(Arc::clone(&self.shared))
    }
}

impl Drop for VmMachine {
    fn drop(&mut self) {
        while self.pauses > 0 {
            let _ = self.resume();
        }
    }
}

impl Machine for VmMachine {
    type Memory = VmMemory;

    fn memory(&self) -> &VmMemory {
        &self.memory
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.shared.vcpus.pause()?;
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.pauses = self.pauses.checked_sub(1).ok_or(PauseError::NotPaused)?;
        Ok(self.shared.vcpus.resume()?)
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.check_paused()?;
        Ok(self.shared.vcpus.regs()?)
    }

    /// The bytes may be code. The vCPUs are outside the guest, the processors that ran them keep
    /// their instruction caches coherent with our stores (x86 does so across all processors), and
    /// each vCPU's next entry into the guest is a serializing event, so none can continue with an
    /// instruction fetched before the write.
    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        if self.pauses == 0 && gpa.0 < self.shared.vm.hidden_base() {
            return Err(PauseError::NotPaused.into());
        }
        self.memory
            .write(gpa, bytes)
            .map_err(|outside| MachineError::Memory {
                gpa: outside.gpa,
                len: outside.len,
            })
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        Ok(self.shared.vm.add_hidden(len)?)
    }

    fn remove_hidden_memory(&mut self, gpa: GuestAddress) -> Result<(), MachineError> {
        Ok(self.shared.vm.remove_hidden(gpa)?)
    }

    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError> {
        let refused = |why: String| {
            MachineError::Interrupt(format!("vector {vector:#x} to vCPU {index}: {why}"))
        };
        let id = u8::try_from(index)
            .ok()
            .filter(|id| *id < self.shared.vm.cpus())
            .ok_or_else(|| refused("there is no such vCPU".to_owned()))?;
        match self.shared.vm.interrupt(id, vector) {
            Ok(true) => Ok(()),
            Ok(false) => Err(refused("its APIC does not accept it".to_owned())),
            Err(e) => Err(refused(format!("KVM_SIGNAL_MSI: {e}"))),
        }
    }
}

impl VmMachine {
    fn check_paused(&self) -> Result<(), MachineError> {
        if self.pauses == 0 {
            return Err(PauseError::NotPaused.into());
        }
        Ok(())
    }
}
