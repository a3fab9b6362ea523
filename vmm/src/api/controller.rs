//! The control of a real guest: its VM by the handle, its kernel by the patcher.
//!
//! Only translates: what can be done is the patcher's, how the answers look is the wire's.

use std::path::Path;
use std::time::{Duration, Instant};

use patcher::{CheckReport, ErrorKind, MachineError, Mode, PatchError, PatchStatus, Patcher};

use crate::api::control::Control;
use crate::api::problem::{Kind, Problem};
use crate::api::types;
use crate::core_dump::{CoreDumpWriter, DumpError};
use crate::vm::handle::VmHandle;
use crate::vm::machine::VmMachine;
use crate::vm::shared::VmState;

/// The guest of this process.
#[derive(Debug)]
pub struct Controller {
    vm: VmHandle,
    machine: VmMachine,
    patcher: Patcher,
    /// The kernel's release, once found.
    release: Option<String>,
    /// Why the last look at a transition failed, so that each reason is told once.
    failure: Option<String>,
}

impl Controller {
    /// Takes control of a guest; nothing is read of it before it is asked for.
    #[must_use]
    pub fn new(vm: VmHandle) -> Controller {
        let machine = vm.machine();
        Controller {
            vm,
            machine,
            patcher: Patcher::new(),
            release: None,
            failure: None,
        }
    }
}

impl Control for Controller {
    fn vm(&mut self) -> types::Vm {
        if self.release.is_none() {
            self.release = self
                .patcher
                .banner(&mut self.machine)
                .ok()
                .as_deref()
                .and_then(release_of);
        }
        types::Vm {
            state: match self.vm.state() {
                VmState::Running => types::VmState::Running,
                VmState::Paused => types::VmState::Paused,
            },
            cpus: self.vm.cpus(),
            memory: self.vm.memory_size(),
            pid: std::process::id(),
            kernel: self.release.clone(),
            pauses: self.patcher.pauses().clone(),
        }
    }

    fn set_state(&mut self, state: types::VmState) -> Result<(), Problem> {
        let done = match state {
            types::VmState::Running => self.vm.resume(),
            types::VmState::Paused => self.vm.pause(),
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
            .map_err(|error| problem(&error))?;
        Ok(tasks.iter().map(types::Task::from).collect())
    }

    fn stack(&mut self, pid: i32) -> Result<types::TaskStack, Problem> {
        let stack = self
            .patcher
            .stack(&mut self.machine, pid)
            .map_err(|error| problem(&error))?;
        Ok(stack.into())
    }

    fn stacks(&mut self) -> Result<Vec<types::TaskStack>, Problem> {
        let stacks = self
            .patcher
            .stacks(&mut self.machine)
            .map_err(|error| problem(&error))?;
        Ok(stacks.into_iter().map(types::TaskStack::from).collect())
    }

    fn symbols(&mut self) -> Result<Vec<types::Symbol>, Problem> {
        let symbols = self
            .patcher
            .symbols(&mut self.machine)
            .map_err(|error| problem(&error))?;
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
            .map_err(|error| problem(&error))?;
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
            .map_err(|error| problem(&error))
    }

    fn apply(&mut self, module: &[u8], mode: Mode) -> Result<String, Problem> {
        self.patcher
            .apply(&mut self.machine, module, mode)
            .map_err(|error| problem(&error))
    }

    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem> {
        self.patcher
            .revert(&mut self.machine, name, mode)
            .map_err(|error| problem(&error))
    }

    fn cancel(&mut self, name: &str) -> Result<(), Problem> {
        self.patcher
            .cancel(&mut self.machine, name)
            .map_err(|error| problem(&error))
    }

    fn force(&mut self, name: &str) -> Result<(), Problem> {
        self.patcher
            .force(&mut self.machine, name)
            .map_err(|error| problem(&error))
    }

    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem> {
        self.patcher
            .signal(&mut self.machine, name, after)
            .map_err(|error| problem(&error))
    }

    fn poll(&mut self) {
        let failure = self.patcher.poll(&mut self.machine).err();
        let failure = failure.map(|error| error.to_string());
        if let Some(error) = &failure
            && self.failure != failure
        {
            tracing::warn!("the transition does not get on: {error}");
        }
        self.failure = failure;
    }

    fn due(&mut self) -> Option<Instant> {
        self.patcher.due()
    }
}

/// `6.1.0-56-cloud-amd64` out of `Linux version 6.1.0-56-cloud-amd64 (…) …`.
fn release_of(banner: &str) -> Option<String> {
    let words = banner.strip_prefix("Linux version ")?;
    words.split_whitespace().next().map(str::to_owned)
}

fn problem(error: &PatchError) -> Problem {
    let (kind, detail) = match error.kind() {
        ErrorKind::BadPatch => (
            Kind::BadModule,
            "give a livepatch module built for exactly this guest's kernel",
        ),
        ErrorKind::Unsupported => (
            Kind::Unsupported,
            "the guest runs on as before; patch it from inside, or wait for a later outpatch",
        ),
        ErrorKind::NotFound => (
            Kind::NotFound,
            "the lists of tasks and of patches name what there is",
        ),
        ErrorKind::Conflict => (
            Kind::Conflict,
            "the status of the patches tells what is there",
        ),
        ErrorKind::Busy => (
            Kind::Unavailable,
            "the guest runs on as before; try again in a moment",
        ),
        ErrorKind::NotReady => (Kind::Unavailable, "wait until the guest has booted"),
        ErrorKind::Guest => (
            Kind::Internal,
            "the guest runs on as before, but its kernel is not one that outpatch can read",
        ),
        ErrorKind::Machine => (Kind::Internal, "see the VMM's own messages"),
        ErrorKind::Internal => (
            Kind::Internal,
            "the guest runs on as before; this is a bug in outpatch",
        ),
    };
    Problem::new(kind, error, detail)
}

fn dump_problem(error: &DumpError) -> Problem {
    let (kind, detail) = match error {
        DumpError::Relative(_) => (Kind::BadRequest, "give an absolute path"),
        DumpError::Exists(_) => (
            Kind::Conflict,
            "give another name, or remove it first: nothing is overwritten",
        ),
        DumpError::Create { .. } => (
            Kind::BadRequest,
            "give a path in a folder that the VMM may write to",
        ),
        _ => (
            Kind::Internal,
            "the guest runs on as before, and nothing is left of the dump",
        ),
    };
    Problem::new(kind, error, detail)
}

fn machine_problem(error: &MachineError) -> Problem {
    Problem::new(Kind::Internal, error, "see the VMM's own messages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_the_banners_third_word() {
        let banner = "Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP";
        assert_eq!(release_of(banner).as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(release_of("Linux version "), None);
        assert_eq!(release_of("FreeBSD"), None);
    }

    #[test]
    fn refusals_keep_the_patchers_words() {
        let p = problem(&PatchError::NoSuchTask(7));
        assert_eq!(
            (p.kind, p.error.as_str()),
            (Kind::NotFound, "no task with pid 7")
        );
        let p = problem(&PatchError::NotReady(introspect::NotReady::NoImage));
        assert_eq!(p.kind, Kind::Unavailable);
    }
}
