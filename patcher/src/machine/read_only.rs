//! Machines that can be read and not changed: a guest that does not run (a core file), and a
//! running guest in a dry run.

use introspect::{PhysMemory, VcpuRegs};
use vm_memory::GuestAddress;

use crate::machine::{Machine, MachineError};

/// The error of every change. Nothing that only reads gets it.
const READ_ONLY: &str = "this guest does not run and cannot be changed";

/// A guest that does not run and can only be read: a core file, for example.
#[derive(Debug)]
pub struct ReadOnlyMachine<M> {
    memory: M,
    vcpus: Vec<VcpuRegs>,
}

impl<M> ReadOnlyMachine<M> {
    /// A guest with this memory, whose vCPUs stopped with these registers.
    pub fn new(memory: M, vcpus: Vec<VcpuRegs>) -> ReadOnlyMachine<M> {
        ReadOnlyMachine { memory, vcpus }
    }
}

impl<M: PhysMemory> Machine for ReadOnlyMachine<M> {
    type Memory = M;

    fn memory(&self) -> &M {
        &self.memory
    }

    fn never_runs(&self) -> bool {
        true
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
        Err(MachineError::HiddenMemory(READ_ONLY.to_owned()))
    }

    fn remove_hidden_memory(&mut self, _gpa: GuestAddress) -> Result<(), MachineError> {
        Err(MachineError::HiddenMemory(READ_ONLY.to_owned()))
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Err(MachineError::Interrupt(READ_ONLY.to_owned()))
    }
}

/// Address of the hidden memory of a dry run: above every guest's memory. It is never read or
/// written.
const DRY_RUN_HIDDEN: u64 = 1 << 50;

/// A machine for dry runs: it pauses and reads another machine and changes nothing. Requests for
/// hidden memory get an address without memory.
pub struct DryRunMachine<'a, M> {
    machine: &'a mut M,
    hidden: GuestAddress,
}

impl<'a, M> DryRunMachine<'a, M> {
    /// A dry run on `machine`.
    pub fn new(machine: &'a mut M) -> DryRunMachine<'a, M> {
        DryRunMachine {
            machine,
            hidden: GuestAddress(DRY_RUN_HIDDEN),
        }
    }
}

impl<M: Machine> Machine for DryRunMachine<'_, M> {
    type Memory = M::Memory;

    fn memory(&self) -> &M::Memory {
        self.machine.memory()
    }

    fn never_runs(&self) -> bool {
        self.machine.never_runs()
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
        Err(MachineError::Interrupt("a dry run sends none".into()))
    }
}
