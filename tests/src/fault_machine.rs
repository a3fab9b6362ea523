//! A machine that fails once, at a requested step, and otherwise passes all calls to another
//! machine.
//!
//! Steps are all calls that can fail: pause, resume, the vCPUs' registers, each write, hidden
//! memory, interrupts.

use introspect::VcpuRegs;
use patcher::{Machine, MachineError};
use vm_memory::GuestAddress;

/// A machine with one fault.
#[derive(Debug)]
pub struct FaultMachine<M> {
    inner: M,
    steps: u64,
    fail_at: Option<u64>,
    failed: Option<&'static str>,
}

impl<M: Machine> FaultMachine<M> {
    /// A machine that fails only when `inner` does.
    pub fn new(inner: M) -> FaultMachine<M> {
        FaultMachine {
            inner,
            steps: 0,
            fail_at: None,
            failed: None,
        }
    }

    /// Makes the step with this number fail, counted from 0 from now on; none if `None`.
    pub fn fail_at(&mut self, step: Option<u64>) {
        self.steps = 0;
        self.fail_at = step;
        self.failed = None;
    }

    /// The name of the call that was made to fail, if the step was reached.
    #[must_use]
    pub fn failed(&self) -> Option<&'static str> {
        self.failed
    }

    /// How many steps there were since [`fail_at`](Self::fail_at).
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The other machine.
    #[must_use]
    pub fn get(&self) -> &M {
        &self.inner
    }

    /// The other machine, to change it.
    pub fn get_mut(&mut self) -> &mut M {
        &mut self.inner
    }

    /// Counts a step, and fails it if it is the requested one.
    fn step(
        &mut self,
        call: &'static str,
        error: impl FnOnce(String) -> MachineError,
    ) -> Result<(), MachineError> {
        let step = self.steps;
        self.steps += 1;
        match self.fail_at {
            Some(failing) if failing == step => {
                self.failed = Some(call);
                Err(error("made to fail".into()))
            }
            _ => Ok(()),
        }
    }
}

impl<M: Machine> Machine for FaultMachine<M> {
    type Memory = M::Memory;

    fn memory(&self) -> &M::Memory {
        self.inner.memory()
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.step("pause", MachineError::Vcpu)?;
        self.inner.pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        // The guest is resumed even so: whether it still works shows only when it runs.
        self.inner.resume()?;
        self.step("resume", MachineError::Vcpu)
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.step("vcpus", MachineError::Vcpu)?;
        self.inner.vcpus()
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let len = bytes.len();
        self.step("write", |_| MachineError::Memory { gpa, len })?;
        self.inner.write(gpa, bytes)
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        self.step("add_hidden_memory", MachineError::HiddenMemory)?;
        self.inner.add_hidden_memory(len)
    }

    fn remove_hidden_memory(&mut self, gpa: GuestAddress) -> Result<(), MachineError> {
        self.step("remove_hidden_memory", MachineError::HiddenMemory)?;
        self.inner.remove_hidden_memory(gpa)
    }

    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError> {
        self.step("interrupt", MachineError::Interrupt)?;
        self.inner.interrupt(index, vector)
    }
}
