//! One pause of the guest, as a guard: the vCPUs stop when it is made and run when it is dropped.
//!
//! The length of the pause goes to a [`PauseReport`]. This module must not know what the pause is
//! for.

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
    /// The registers of every vCPU, as they stopped.
    pub vcpus: Vec<VcpuRegs>,
    /// The tasks that were read and the stacks that were walked, for the report.
    counts: (u64, u64),
    stopped: bool,
}

impl<'a, M: Machine> PauseGuard<'a, M> {
    /// Stops the guest and reads the registers of its vCPUs. The length of the pause goes to
    /// `meter`.
    ///
    /// # Errors
    /// [`MachineError`] if they cannot be stopped or read; the guest runs.
    pub fn begin(machine: &'a mut M, meter: &'a mut PauseReport) -> Result<Self, MachineError> {
        let since = Instant::now();
        machine.pause()?;
        let mut paused = PauseGuard {
            machine,
            meter,
            since,
            vcpus: Vec::new(),
            counts: (0, 0),
            stopped: true,
        };
        paused.vcpus = paused.machine.vcpus()?;
        Ok(paused)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &M::Memory {
        self.machine.memory()
    }

    /// Makes all of `writes`, or none.
    ///
    /// # Errors
    /// As [`WriteBatch::commit`].
    pub fn commit(&mut self, writes: &WriteBatch) -> Result<UndoLog, PatchError> {
        writes.commit(self.machine)
    }

    /// Sends an interrupt that the vCPU takes once the guest runs.
    ///
    /// # Errors
    /// [`MachineError::Interrupt`].
    pub fn interrupt(&mut self, vcpu: u32, vector: u8) -> Result<(), MachineError> {
        self.machine.interrupt(vcpu, vector)
    }

    /// Undoes what [`commit`](Self::commit) wrote in this pause, because of `cause`. Returns the
    /// error to report.
    pub fn undo(&mut self, undo_log: &UndoLog, cause: PatchError) -> PatchError {
        undo_log.undo(self.machine, cause)
    }

    /// Notes for the report how many tasks were read and how many stacks were walked in this pause.
    pub fn note(&mut self, tasks: usize, walked: usize) {
        self.counts = (tasks as u64, walked as u64);
    }

    /// Resumes the guest. Returns the length of the pause.
    ///
    /// # Errors
    /// [`MachineError`] if the vCPUs cannot be started.
    pub fn resume(mut self) -> Result<Duration, MachineError> {
        self.end()
    }

    fn end(&mut self) -> Result<Duration, MachineError> {
        if !std::mem::replace(&mut self.stopped, false) {
            return Ok(Duration::ZERO);
        }
        let done = self.machine.resume();
        let length = self.since.elapsed();
        let (tasks, walked) = self.counts;
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
