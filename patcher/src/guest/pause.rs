//! One pause of the guest: begun, used, ended, and counted.
//!
//! The vCPUs stop when a [`PauseGuard`] is made and run again when it is dropped, whatever happens in between.

use std::time::{Duration, Instant};

use introspect::VcpuRegs;

use crate::error::PatchError;
use crate::machine::{Machine, MachineError};
use crate::memory::write_batch::{UndoLog, WriteBatch};
use crate::report::pause::{PauseLength, PauseReport};

/// A guest with all its vCPUs stopped.
#[derive(Debug)]
pub struct PauseGuard<'a, M: Machine> {
    machine: &'a mut M,
    meter: &'a mut PauseReport,
    since: Instant,
    /// Registers of every vCPU, as they stopped.
    pub vcpus: Vec<VcpuRegs>,
    saw: (u64, u64),
    stopped: bool,
}

impl<'a, M: Machine> PauseGuard<'a, M> {
    /// Stops the guest and reads its vCPUs; the length of the pause goes to `meter`.
    ///
    /// # Errors
    /// [`MachineError`], with the guest running.
    pub fn begin(machine: &'a mut M, meter: &'a mut PauseReport) -> Result<Self, MachineError> {
        let since = Instant::now();
        machine.pause()?;
        let mut paused = PauseGuard {
            machine,
            meter,
            since,
            vcpus: Vec::new(),
            saw: (0, 0),
            stopped: true,
        };
        paused.vcpus = paused.machine.vcpus()?;
        Ok(paused)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &M::Memory {
        self.machine.memory()
    }

    /// Carries a plan out.
    ///
    /// # Errors
    /// As [`WriteBatch::commit`].
    pub fn commit(&mut self, plan: &WriteBatch) -> Result<UndoLog, PatchError> {
        plan.commit(self.machine)
    }

    /// Sends an interrupt that the vCPU takes once the guest runs.
    ///
    /// # Errors
    /// [`MachineError::Interrupt`].
    pub fn interrupt(&mut self, vcpu: u32, vector: u8) -> Result<(), MachineError> {
        self.machine.interrupt(vcpu, vector)
    }

    /// Puts back what [`commit`](Self::commit) did in this pause.
    pub fn undo(&mut self, journal: &UndoLog, cause: PatchError) -> PatchError {
        journal.undo(self.machine, cause)
    }

    /// For the report: so many tasks were looked at in this pause, and so many stacks walked.
    pub fn note(&mut self, tasks: usize, walked: usize) {
        self.saw = (tasks as u64, walked as u64);
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`MachineError`]: the machine could not start its vCPUs.
    pub fn resume(mut self) -> Result<Duration, MachineError> {
        self.end()
    }

    fn end(&mut self) -> Result<Duration, MachineError> {
        if !std::mem::replace(&mut self.stopped, false) {
            return Ok(Duration::ZERO);
        }
        let done = self.machine.resume();
        let length = self.since.elapsed();
        let (tasks, walked) = self.saw;
        self.meter.add(PauseLength {
            us: u64::try_from(length.as_micros()).unwrap_or(u64::MAX),
            tasks,
            walked,
        });
        done.map(|()| length)
    }
}

impl<M: Machine> Drop for PauseGuard<'_, M> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the guest could not be resumed");
        }
    }
}
