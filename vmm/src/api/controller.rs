//! Implements [`Control`] for a real guest: the VM through its handle, the kernel through the
//! patcher.
//!
//! This module only translates between the API's types and those of the VM and the patcher. It
//! knows no HTTP but the kinds of errors; it must not decide what can be done to a guest.

use std::path::Path;
use std::time::{Duration, Instant};

use patcher::{
    CheckReport, ErrorKind, LinkError, MachineError, Mode, PatchError, PatchStatus, Patcher,
};

use crate::api::control::Control;
use crate::api::problem::{Kind, Problem};
use crate::api::types;
use crate::core_dump::{CoreDumpWriter, DumpError};
use crate::vm::handle::VmHandle;
use crate::vm::machine::VmMachine;
use crate::vm::shared::VmState;

/// The control of the guest in this process.
#[derive(Debug)]
pub struct Controller {
    vm: VmHandle,
    machine: VmMachine,
    patcher: Patcher,
    /// Why the last poll of a transition failed, so that each reason is logged once.
    failure: Option<String>,
}

impl Controller {
    /// Takes control of a guest. Reads nothing of it before the first request.
    #[must_use]
    pub fn new(vm: VmHandle) -> Controller {
        let machine = vm.machine();
        Controller {
            vm,
            machine,
            patcher: Patcher::new(),
            failure: None,
        }
    }

    fn problem(&self, error: &PatchError) -> Problem {
        problem(error, self.vm.state())
    }
}

impl Control for Controller {
    fn vm(&mut self) -> types::Vm {
        // While the guest boots there is none, also while another kernel boots that it has started.
        let found = self.patcher.kernel_in_use(&mut self.machine).ok();
        let panicked = found.as_ref().is_some_and(|found| found.panicked);
        let kernel = found.map(|found| found.kernel.release.clone());
        types::Vm {
            state: match self.vm.state() {
                VmState::Paused => types::VmState::Paused,
                VmState::Running if panicked => types::VmState::Panicked,
                VmState::Running => types::VmState::Running,
            },
            cpus: self.vm.cpus(),
            memory: self.vm.memory_size(),
            pid: std::process::id(),
            kernel,
            pauses: self.patcher.pauses().clone(),
        }
    }

    fn set_state(&mut self, state: types::RequestedState) -> Result<(), Problem> {
        let done = match state {
            types::RequestedState::Running => self.vm.resume(),
            types::RequestedState::Paused => self.vm.pause(),
        };
        done.map_err(|error| machine_problem(&error))
    }

    fn stop(&mut self) -> Result<(), Problem> {
        self.vm.request_stop();
        Ok(())
    }

    fn tasks(&mut self) -> Result<Vec<types::Task>, Problem> {
        let tasks = self
            .patcher
            .tasks(&mut self.machine)
            .map_err(|error| self.problem(&error))?;
        Ok(types::Task::of_reading(tasks))
    }

    fn stack(&mut self, pid: i32) -> Result<types::TaskStack, Problem> {
        let stack = self
            .patcher
            .stack(&mut self.machine, pid)
            .map_err(|error| self.problem(&error))?;
        Ok(types::TaskStack::of_reading(stack))
    }

    fn stacks(&mut self) -> Result<Vec<types::TaskStack>, Problem> {
        let stacks = self
            .patcher
            .stacks(&mut self.machine)
            .map_err(|error| self.problem(&error))?;
        Ok(types::TaskStack::list_of_reading(stacks))
    }

    fn symbols(&mut self) -> Result<Vec<types::Symbol>, Problem> {
        let symbols = self
            .patcher
            .symbols(&mut self.machine)
            .map_err(|error| self.problem(&error))?;
        Ok(symbols.into_iter().map(types::Symbol::from).collect())
    }

    fn dump(&mut self, path: &Path) -> Result<types::Dump, Problem> {
        let mut dump = CoreDumpWriter::create(path).map_err(|error| dump_problem(&error))?;
        let (written, paused) = self
            .patcher
            .hold(&mut self.machine, |kernel, memory, vcpus| {
                let vmcoreinfo =
                    kernel.and_then(|kernel| kernel.vmcoreinfo(&kernel.memory(memory)));
                dump.write(memory, vcpus, vmcoreinfo.as_deref())
            })
            .map_err(|error| self.problem(&error))?;
        let bytes = written.map_err(|error| dump_problem(&error))?;
        dump.finish().map_err(|error| dump_problem(&error))?;
        Ok(types::Dump {
            path: path.display().to_string(),
            bytes,
            paused_us: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX),
        })
    }

    fn patches(&mut self) -> Vec<PatchStatus> {
        self.patcher.status()
    }

    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem> {
        self.patcher
            .check(&mut self.machine, module)
            .map_err(|error| self.problem(&error))
    }

    fn apply(&mut self, module: &[u8], mode: Mode) -> Result<String, Problem> {
        self.patcher
            .apply(&mut self.machine, module, mode)
            .map_err(|error| self.problem(&error))
    }

    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem> {
        self.patcher
            .revert(&mut self.machine, name, mode)
            .map_err(|error| self.problem(&error))
    }

    fn cancel(&mut self, name: &str) -> Result<(), Problem> {
        self.patcher
            .cancel(&mut self.machine, name)
            .map_err(|error| self.problem(&error))
    }

    fn force(&mut self, name: &str) -> Result<(), Problem> {
        self.patcher
            .force(&mut self.machine, name)
            .map_err(|error| self.problem(&error))
    }

    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem> {
        self.patcher
            .signal(&mut self.machine, name, after)
            .map_err(|error| self.problem(&error))
    }

    fn poll(&mut self) {
        let failure = self.patcher.poll(&mut self.machine).err();
        let failure = failure.map(|error| error.to_string());
        if let Some(error) = &failure
            && self.failure != failure
        {
            tracing::warn!("cannot continue the transition: {error}");
        }
        self.failure = failure;
    }

    fn due(&mut self) -> Option<Instant> {
        self.patcher.due()
    }
}

/// The API's error for an error of the patcher, in the patcher's words.
///
/// A guest that the operator has paused is not busy, nor does it boot: it stays as it is, and
/// trying again does not help.
fn problem(error: &PatchError, state: VmState) -> Problem {
    let (kind, detail) = answer_to(error.kind());
    if state == VmState::Running {
        return Problem::new(kind, error, detail);
    }
    let found = match error {
        PatchError::Busy { what, .. } => {
            format!("the guest is paused in the middle of a change ({what})")
        }
        PatchError::NotReady(why) => {
            format!("the guest is paused, and its kernel is not up yet: {why}")
        }
        PatchError::NotAtOnce { .. } | PatchError::Module(LinkError::Booting) => {
            format!("the guest is paused: {error}")
        }
        _ => return Problem::new(kind, error, detail),
    };
    Problem::new(
        Kind::Conflict,
        found,
        "nothing was changed in the guest; resume it (outpatch resume, or PATCH /vm) first",
    )
}

/// The API's kind for each kind of error, and what its reader can do about it. An error that says
/// "try again" is one of [`Kind::Conflict`] or [`Kind::Unavailable`].
fn answer_to(kind: ErrorKind) -> (Kind, &'static str) {
    match kind {
        ErrorKind::BadPatch => (
            Kind::BadModule,
            "build the livepatch module for exactly this guest's kernel",
        ),
        ErrorKind::Unsupported => (
            Kind::Unsupported,
            "the guest is as before; docs/limits.md lists what outpatch does not support",
        ),
        ErrorKind::NotFound => (Kind::NotFound, "see GET /tasks and GET /patches"),
        ErrorKind::Conflict => (Kind::Conflict, "see GET /patches"),
        ErrorKind::Ended => (
            Kind::Conflict,
            "it can still be read (outpatch ps, stack, dump); start the guest again to patch it",
        ),
        ErrorKind::Busy => (
            Kind::Unavailable,
            "nothing was changed in the guest; try again in a moment",
        ),
        ErrorKind::NotReady => (Kind::Unavailable, "wait until the guest has booted"),
        ErrorKind::Guest => (
            Kind::Internal,
            "the guest runs on as before, but outpatch cannot read its kernel",
        ),
        ErrorKind::Machine => (Kind::Internal, "see the VMM's own messages"),
        ErrorKind::Internal => (
            Kind::Internal,
            "the guest runs on as before; this is a bug in outpatch",
        ),
    }
}

fn dump_problem(error: &DumpError) -> Problem {
    let (kind, detail) = match error {
        DumpError::Relative(_) => (Kind::BadRequest, "give an absolute path"),
        DumpError::Exists(_) => (
            Kind::Conflict,
            "give another name, or remove the file first: nothing is overwritten",
        ),
        DumpError::Create { .. } => (
            Kind::BadRequest,
            "give a path in a directory that the VMM may write to",
        ),
        _ => (
            Kind::Internal,
            "the guest runs on as before, and no part of the core file is left",
        ),
    };
    Problem::new(kind, error, detail)
}

fn machine_problem(error: &MachineError) -> Problem {
    Problem::new(Kind::Internal, error, "see the VMM's own messages")
}

#[cfg(test)]
mod tests;
