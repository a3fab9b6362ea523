//! What others than the vCPUs hold of a running machine: its state, its pause, its end.

use std::sync::{Arc, PoisonError};

use patcher::MachineError;

use crate::vm::machine::VmMachine;
use crate::vm::shared::{Shared, VmState};
use crate::vm::vcpu_set::PauseStats;

/// A running machine. Cheap to clone, for any thread.
#[derive(Clone, Debug)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

impl VmHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> VmHandle {
        VmHandle { shared }
    }

    /// A new view of the machine for the patcher, with no pause held.
    #[must_use]
    pub fn machine(&self) -> VmMachine {
        VmMachine::new(Arc::clone(&self.shared))
    }

    /// The operator's pause: the guest stands until [`resume`](Self::resume). Pausing a paused guest is no error.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`].
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
    /// [`MachineError::Vcpu`].
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

    /// Asks for the machine to be switched off, without the guest having a say.
    pub fn request_stop(&self) {
        if let Err(e) = self.shared.stop.write(1) {
            tracing::error!("the request to stop is lost: {e}");
        }
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.shared.vcpus.count()
    }

    /// Bytes of guest RAM.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.shared.vm.ram_size()
    }

    /// What all pauses so far have cost the guest, whoever asked for them.
    #[must_use]
    pub fn pauses(&self) -> PauseStats {
        self.shared.vcpus.stats()
    }
}
