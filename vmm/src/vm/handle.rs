//! The operator's handle on a running machine: pauses it, resumes it, requests its stop, and
//! reports its state and size. The patcher's is [`VmMachine`].

use std::sync::{Arc, PoisonError};

use patcher::MachineError;

use crate::vm::machine::VmMachine;
use crate::vm::shared::{Shared, VmState};
use crate::vm::vcpu_set::PauseStats;

/// A handle on a running machine for any thread but a vCPU's. Clones share the machine and are
/// cheap.
#[derive(Clone, Debug)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

impl VmHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> VmHandle {
        VmHandle { shared }
    }

    /// A new [`VmMachine`] for the patcher, which holds no pause yet.
    #[must_use]
    pub fn machine(&self) -> VmMachine {
        VmMachine::new(Arc::clone(&self.shared))
    }

    /// The operator's pause: the guest does not run until [`resume`](Self::resume). Pausing a
    /// paused guest is no error.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`]: a vCPU did not stop, or the guest has ended.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *state == VmState::Running {
            self.shared.vcpus.pause()?;
            *state = VmState::Paused;
        }
        Ok(())
    }

    /// Ends the operator's pause. Resuming a running guest is no error.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`]: the vCPUs are not paused.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *state == VmState::Paused {
            self.shared.vcpus.resume()?;
            *state = VmState::Running;
        }
        Ok(())
    }

    /// Whether the operator lets the guest run.
    #[must_use]
    pub fn state(&self) -> VmState {
        *self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that the machine stop. It stops soon after, without shutting the guest down first.
    pub fn request_stop(&self) {
        if let Err(e) = self.shared.stop.write(1) {
            tracing::error!("the request to stop is lost: {e}");
        }
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.shared.vcpus.count()
    }

    /// The size of the guest's RAM in bytes.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.shared.vm.ram_size()
    }

    /// How often and for how long the vCPUs were paused so far, by all users together.
    #[must_use]
    pub fn pauses(&self) -> PauseStats {
        self.shared.vcpus.stats()
    }
}
