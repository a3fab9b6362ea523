//! What the handles of one running machine share: the vCPUs, the VM, the operator's pause and the
//! request to stop.

use std::sync::Mutex;

use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Vm;
use crate::vm::vcpu_set::Vcpus;

/// Whether the operator lets the guest run. The short pauses in which the patcher reads or changes
/// the guest do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The guest runs.
    Running,
    /// The operator has paused the guest.
    Paused,
}

/// One running machine, shared by every [`VmHandle`](crate::VmHandle) and
/// [`VmMachine`](crate::VmMachine).
#[derive(Debug)]
pub struct Shared {
    // Before `vm`, because it is dropped first: the vCPU threads must end before guest memory goes.
    pub vcpus: Vcpus,
    pub vm: Vm,
    /// Whether the operator holds a pause.
    pub state: Mutex<VmState>,
    /// Written to when the guest shall be stopped; the event loop reads it.
    pub stop: EventFd,
}
