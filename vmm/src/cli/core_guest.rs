//! The guest in a core file, which answers the same queries as a running one.
//!
//! For the patcher it is a machine whose vCPUs never run and whose memory cannot be written.

use std::path::{Path, PathBuf};

use introspect::CoreFile;
use patcher::{CheckReport, PatchError, Patcher, ReadOnlyMachine};
use vmm::api::types::{Symbol, Task, TaskStack};

use crate::cli::error::CommandError;

/// The guest in a core file.
#[derive(Debug)]
pub struct CoreGuest {
    path: PathBuf,
    machine: ReadOnlyMachine<CoreFile>,
    patcher: Patcher,
}

impl CoreGuest {
    /// Opens the core file; the first query finds its kernel.
    ///
    /// # Errors
    /// When the file is not a core file that outpatch reads.
    pub fn open(path: &Path) -> Result<CoreGuest, CommandError> {
        let core = CoreFile::open(path).map_err(|source| CommandError::Core {
            path: path.to_owned(),
            source,
        })?;
        let vcpus = core.vcpus().to_vec();
        Ok(CoreGuest {
            path: path.to_owned(),
            machine: ReadOnlyMachine::new(core, vcpus),
            patcher: Patcher::new(),
        })
    }

    /// All tasks of the guest.
    pub fn tasks(&mut self) -> Result<Vec<Task>, CommandError> {
        let tasks = self.patcher.tasks(&mut self.machine);
        let tasks = tasks.map_err(|error| self.failed(error))?;
        Ok(Task::of_reading(tasks))
    }

    /// One task's stack.
    pub fn stack(&mut self, pid: i32) -> Result<TaskStack, CommandError> {
        let stack = self.patcher.stack(&mut self.machine, pid);
        let stack = stack.map_err(|error| self.failed(error))?;
        Ok(TaskStack::of_reading(stack))
    }

    /// Every task's stack.
    pub fn stacks(&mut self) -> Result<Vec<TaskStack>, CommandError> {
        let stacks = self.patcher.stacks(&mut self.machine);
        let stacks = stacks.map_err(|error| self.failed(error))?;
        Ok(TaskStack::list_of_reading(stacks))
    }

    /// What applying a module, read from `file`, would do.
    pub fn check(&mut self, file: &Path, module: &[u8]) -> Result<CheckReport, CommandError> {
        let report = self.patcher.check(&mut self.machine, module);
        report.map_err(|source| match source {
            busy @ PatchError::Busy { .. } => self.failed(busy),
            source => CommandError::NotForCore {
                file: file.to_owned(),
                core: self.path.clone(),
                source,
            },
        })
    }

    /// All symbols of the guest's kernel and modules.
    pub fn symbols(&mut self) -> Result<Vec<Symbol>, CommandError> {
        let symbols = self.patcher.symbols(&mut self.machine);
        let symbols = symbols.map_err(|error| self.failed(error))?;
        Ok(symbols.into_iter().map(Symbol::from).collect())
    }

    fn failed(&self, source: PatchError) -> CommandError {
        failed(&self.path, source)
    }
}

/// The error of a failed query. A busy guest stays so in its core: trying again does not help.
fn failed(path: &Path, source: PatchError) -> CommandError {
    let path = path.to_owned();
    match source {
        PatchError::Busy { what, .. } => CommandError::CaughtInCore { path, what },
        source => CommandError::InCore { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_of_a_busy_guest_is_an_error_that_does_not_say_try_again() {
        let busy = PatchError::Busy {
            what: "tasklist_lock is held for writing".into(),
            tries: 100,
        };
        let text = failed(Path::new("a.core"), busy).to_string();
        assert!(
            text.contains("(tasklist_lock is held for writing)"),
            "{text}"
        );
        assert!(!text.contains("try again"), "{text}");
        let other = failed(Path::new("a.core"), PatchError::NoSuchTask(7)).to_string();
        assert_eq!(other, "a.core: no task with pid 7");
    }
}
