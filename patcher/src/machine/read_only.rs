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
