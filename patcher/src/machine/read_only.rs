//! A guest that stands still for ever, as a machine: a core file, say. It can be looked at, and not be changed.

use introspect::{PhysMemory, VcpuRegs};
use vm_memory::GuestAddress;

use crate::machine::{Machine, MachineError};

/// Nothing that only looks gets here.
const FIXED: &str = "this guest stands still and cannot be changed";

/// A guest that stands still.
#[derive(Debug)]
pub struct ReadOnlyMachine<M> {
    memory: M,
    vcpus: Vec<VcpuRegs>,
}

impl<M> ReadOnlyMachine<M> {
    /// One with this memory, whose vCPUs stopped with these registers.
    pub fn new(memory: M, vcpus: Vec<VcpuRegs>) -> ReadOnlyMachine<M> {
        ReadOnlyMachine { memory, vcpus }
    }
}

impl<M: PhysMemory> Machine for ReadOnlyMachine<M> {
    type Memory = M;

    fn memory(&self) -> &M {
        &self.memory
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let len = bytes.len();
        Err(MachineError::Memory { gpa, len })
    }

    fn add_hidden_memory(&mut self, _len: u64) -> Result<GuestAddress, MachineError> {
        Err(MachineError::HiddenMemory(FIXED.to_owned()))
    }

    fn remove_hidden_memory(&mut self, _gpa: GuestAddress) -> Result<(), MachineError> {
        Err(MachineError::HiddenMemory(FIXED.to_owned()))
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Err(MachineError::Interrupt(FIXED.to_owned()))
    }
}

/// Above every guest's memory, and of no consequence: nobody reads or writes there.
const MADE_UP_MEMORY: u64 = 1 << 50;

/// A machine that can only be read. Hidden memory that is asked for is made up: an address with nothing behind it.
pub struct DryRunMachine<'a, M> {
    machine: &'a mut M,
    hidden: GuestAddress,
}

impl<'a, M> DryRunMachine<'a, M> {
    /// One that reads from `machine`.
    pub fn new(machine: &'a mut M) -> DryRunMachine<'a, M> {
        DryRunMachine {
            machine,
            hidden: GuestAddress(MADE_UP_MEMORY),
        }
    }
}

impl<M: Machine> Machine for DryRunMachine<'_, M> {
    type Memory = M::Memory;

    fn memory(&self) -> &M::Memory {
        self.machine.memory()
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.machine.vcpus()
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let len = bytes.len();
        Err(MachineError::Memory { gpa, len })
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        let gpa = self.hidden;
        self.hidden = GuestAddress(gpa.0.saturating_add(len));
        Ok(gpa)
    }

    fn remove_hidden_memory(&mut self, _gpa: GuestAddress) -> Result<(), MachineError> {
        Ok(())
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Err(MachineError::Interrupt("a check sends none".into()))
    }
}
