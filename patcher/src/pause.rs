//! One pause of the guest: begun, used, ended, and counted.
//!
//! The vCPUs stop when a [`Paused`] is made and run again when it is dropped, whatever happens in between.

use std::time::{Duration, Instant};

use introspect::VcpuRegs;

use crate::error::PatchError;
use crate::journal::{Journal, Plan};
use crate::machine::{Machine, MachineError};
use crate::status::PauseReport;

impl PauseReport {
    /// Adds one pause.
    pub fn add(&mut self, length: Duration) {
        let us = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        self.count = self.count.saturating_add(1);
        self.total_us = self.total_us.saturating_add(us);
        self.longest_us = self.longest_us.max(us);
    }

    /// Adds the pauses of `other`.
    pub fn merge(&mut self, other: &PauseReport) {
        self.count = self.count.saturating_add(other.count);
        self.total_us = self.total_us.saturating_add(other.total_us);
        self.longest_us = self.longest_us.max(other.longest_us);
    }
}

/// A guest with all its vCPUs stopped.
#[derive(Debug)]
pub struct Paused<'a, M: Machine> {
    machine: &'a mut M,
    meter: &'a mut PauseReport,
    since: Instant,
    /// Registers of every vCPU, as they stopped.
    pub vcpus: Vec<VcpuRegs>,
    stopped: bool,
}

impl<'a, M: Machine> Paused<'a, M> {
    /// Stops the guest and reads its vCPUs; the length of the pause goes to `meter`.
    ///
    /// # Errors
    /// [`MachineError`], with the guest running.
    pub fn begin(machine: &'a mut M, meter: &'a mut PauseReport) -> Result<Self, MachineError> {
        let since = Instant::now();
        machine.pause()?;
        let mut paused = Paused {
            machine,
            meter,
            since,
            vcpus: Vec::new(),
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
    /// As [`Plan::commit`].
    pub fn commit(&mut self, plan: &Plan) -> Result<Journal, PatchError> {
        plan.commit(self.machine)
    }

    /// Puts back what [`commit`](Self::commit) did in this pause.
    pub fn undo(&mut self, journal: &Journal, cause: PatchError) -> PatchError {
        journal.undo(self.machine, cause)
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
        self.meter.add(length);
        done.map(|()| length)
    }
}

impl<M: Machine> Drop for Paused<'_, M> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the guest could not be resumed");
        }
    }
}
