//! A guest in a core file, asked the same questions as a running one.
//!
//! To the patcher it is a machine whose vCPUs stand still for ever and whose memory cannot be written.

use std::path::{Path, PathBuf};

use introspect::modules::modules;
use introspect::{CoreFile, Gva, VcpuRegs};
use patcher::{Machine, MachineError, PatchError, Patcher};
use serde::Serialize;
use vm_memory::GuestAddress;
use vmm::api::wire::{Task, TaskStack};

use super::verbs::VerbError;

/// A guest in a core file.
#[derive(Debug)]
pub struct CoreGuest {
    path: PathBuf,
    machine: CoreMachine,
    patcher: Patcher,
}

/// One symbol, as a line of `/proc/kallsyms` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Symbol {
    /// Its address.
    pub address: Gva,
    /// The letter that `nm` gives it.
    #[serde(rename = "type")]
    pub letter: char,
    /// Its name.
    pub name: String,
    /// The module that it is in.
    pub module: Option<String>,
}

impl CoreGuest {
    /// Opens the core file; its kernel is looked for at the first question.
    ///
    /// # Errors
    /// Why it is none.
    pub fn open(path: &Path) -> Result<CoreGuest, VerbError> {
        let core = CoreFile::open(path).map_err(|source| VerbError::Core {
            path: path.to_owned(),
            source,
        })?;
        Ok(CoreGuest {
            path: path.to_owned(),
            machine: CoreMachine(core),
            patcher: Patcher::new(),
        })
    }

    /// All tasks.
    pub fn tasks(&mut self) -> Result<Vec<Task>, VerbError> {
        let tasks = self.patcher.tasks(&mut self.machine);
        let tasks = tasks.map_err(|error| self.failed(error))?;
        Ok(tasks.iter().map(Task::from).collect())
    }

    /// One task's stack.
    pub fn stack(&mut self, pid: i32) -> Result<TaskStack, VerbError> {
        let stack = self.patcher.stack(&mut self.machine, pid);
        Ok(stack.map_err(|error| self.failed(error))?.into())
    }

    /// The symbols of the kernel, and then those of each module.
    pub fn symbols(&mut self) -> Result<Vec<Symbol>, VerbError> {
        // Found first, so that a core without a kernel says why.
        self.patcher
            .banner(&mut self.machine)
            .map_err(|error| self.failed(error))?;
        let (symbols, _) = self
            .patcher
            .hold(&mut self.machine, |kernel, core, _| {
                let kernel = kernel.ok_or_else(|| PatchError::Guest("no kernel".to_owned()))?;
                let memory = kernel.memory(core);
                let mut all: Vec<Symbol> = kernel.symbols.iter().map(|s| symbol(s, None)).collect();
                let unreadable = |error: &dyn ToString| PatchError::Guest(error.to_string());
                for module in modules(kernel, &memory).map_err(|e| unreadable(&e))? {
                    let symbols = module.symbols(kernel, &memory);
                    let symbols = symbols.map_err(|e| unreadable(&e))?;
                    all.extend(symbols.iter().map(|s| symbol(s, Some(&module.name))));
                }
                Ok(all)
            })
            .map_err(|error| self.failed(error))?;
        symbols.map_err(|error| self.failed(error))
    }

    fn failed(&self, source: PatchError) -> VerbError {
        let path = self.path.clone();
        VerbError::InCore { path, source }
    }
}

fn symbol(symbol: introspect::Symbol<'_>, module: Option<&str>) -> Symbol {
    Symbol {
        address: symbol.gva,
        letter: symbol.letter,
        name: symbol.name.to_owned(),
        module: module.map(str::to_owned),
    }
}

/// A core file as a machine.
#[derive(Debug)]
struct CoreMachine(CoreFile);

/// Nothing that only looks gets here.
const FIXED: &str = "a core file cannot be changed";

impl Machine for CoreMachine {
    type Memory = CoreFile;

    fn memory(&self) -> &CoreFile {
        &self.0
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        Ok(self.0.vcpus().to_vec())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let len = bytes.len();
        Err(MachineError::Memory { gpa, len })
    }

    fn add_hidden_memory(&mut self, _len: u64) -> Result<GuestAddress, MachineError> {
        Err(MachineError::HiddenMemory(FIXED.to_owned()))
    }

    fn remove_hidden_memory(&mut self, _gpa: GuestAddress) -> Result<(), MachineError> {
        Err(MachineError::HiddenMemory(FIXED.to_owned()))
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Err(MachineError::Interrupt(FIXED.to_owned()))
    }
}
