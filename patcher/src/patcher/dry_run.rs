//! Applying a patch without applying it: everything that `apply` does up to its first write, with the same code.
//!
//! What is prepared is prepared on a machine that answers every read and takes no write, and in a copy of the book of places;
//! afterwards nothing is left of it.

use std::time::Duration;

use introspect::{Gva, PhysMemory, Task, VcpuRegs};
use vm_memory::GuestAddress;

use crate::error::PatchError;
use crate::error::StepError;
use crate::guest::Guest;
use crate::guest::view::CodeSet;
use crate::livepatch::patch::Patch;
use crate::livepatch::prepare;
use crate::machine::{Machine, MachineError};
use crate::memory::{Allocation, PatchMemory};
use crate::module::LivepatchModule;
use crate::report::patch::{CheckReport, FoundFunction, FoundSymbol, PauseReport, PieceReport};
use crate::transition::Direction;
use crate::transition::progress::Progress;
use crate::transition::step::{Step, StepContext};

/// Above every guest's memory, and of no consequence: nobody reads or writes there.
const MADE_UP_MEMORY: u64 = 1 << 50;

/// A patch as it would be, ready for the pause in which it would begin.
pub struct DryRun {
    patch: Patch,
    places: PatchMemory,
    dummy: Option<Gva>,
    alone: bool,
}

impl DryRun {
    /// Places and links `module` as [`prepare::prepare`] does.
    ///
    /// # Errors
    /// [`PatchError`].
    pub fn prepare<M: Machine>(
        machine: &mut M,
        guest: &mut Guest,
        places: &PatchMemory,
        module: &LivepatchModule,
        others: &[Patch],
    ) -> Result<DryRun, PatchError> {
        let mut machine = DryRunMachine {
            machine,
            hidden: GuestAddress(MADE_UP_MEMORY),
        };
        let mut places = places.clone();
        let dummy = match places.known_dummy() {
            Some(dummy) => Some(dummy),
            None => {
                let facts = guest.facts()?;
                let piece = places.take_dummy(&mut machine, &guest.kernel, facts)?;
                piece.map(|piece| piece.range.start)
            }
        };
        let patch = prepare::prepare(&mut machine, guest, &mut places, module, others)?;
        Ok(DryRun {
            patch,
            places,
            dummy,
            alone: others.is_empty(),
        })
    }

    /// What the first pause would do, with the tasks that it would see, and the number of stacks that it would walk.
    ///
    /// # Errors
    /// [`StepError`], as the first pause would.
    pub fn step(
        &self,
        guest: &mut Guest,
        memory: &dyn PhysMemory,
        vcpus: &[VcpuRegs],
    ) -> Result<(Vec<Task>, Step, usize), StepError> {
        let facts = guest.facts()?.clone();
        let look = guest.look(memory, vcpus)?;
        let scene = StepContext {
            look: &look,
            facts: &facts,
            places: &self.places,
            dummy: self.dummy,
            patch: &self.patch,
            alone: self.alone,
            signal: None,
            unmoved: None,
        };
        let step = scene.begin(Direction::Apply, false)?;
        Ok((look.tasks().cloned().collect(), step, look.walked()))
    }

    /// The code that tasks must have left.
    #[must_use]
    pub fn watch(&self) -> CodeSet {
        Direction::Apply.watch(&self.patch)
    }

    /// Takes what it has in the unwinder out again.
    pub fn forget(&self, guest: &mut Guest) {
        self.patch.forget(&mut guest.unwinder);
    }

    /// What is to be said of it.
    #[must_use]
    pub fn report(&self, tasks: &[Task], step: Step, pauses: PauseReport) -> CheckReport {
        let mut ledger = Progress::default();
        ledger.enter(Duration::ZERO, tasks.iter().zip(step.findings));
        let mut tasks = ledger.reports();
        for task in &mut tasks {
            // No transition began.
            task.after_ms = None;
            task.since_ms = None;
        }
        let patch = &self.patch;
        let functions = patch.redirects.iter().map(|redirect| {
            let body = redirect.body.first().copied().unwrap_or_default();
            FoundFunction {
                object: "vmlinux".into(),
                name: redirect.name.clone(),
                sympos: redirect.sympos,
                address: body.start.to_string(),
                size: body.len(),
            }
        });
        let symbols = patch.image.imports.iter().map(|import| FoundSymbol {
            name: import.name.clone(),
            address: import.address.to_string(),
        });
        CheckReport {
            name: patch.name().into(),
            functions: functions.collect(),
            symbols: symbols.collect(),
            code: piece(patch.code),
            data: patch.data.map(piece),
            tasks,
            at_once: step.finished,
            pauses,
        }
    }
}

fn piece(piece: Allocation) -> PieceReport {
    PieceReport {
        address: piece.range.start.to_string(),
        bytes: piece.range.len(),
        hidden: !piece.is_in_cave(),
    }
}

/// A machine that can only be read. Hidden memory that is asked for is made up: an address with nothing behind it.
struct DryRunMachine<'a, M> {
    machine: &'a mut M,
    hidden: GuestAddress,
}

impl<M: Machine> Machine for DryRunMachine<'_, M> {
    type Memory = M::Memory;

    fn memory(&self) -> &M::Memory {
        self.machine.memory()
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.machine.vcpus()
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        let len = bytes.len();
        Err(MachineError::Memory { gpa, len })
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        let gpa = self.hidden;
        self.hidden = GuestAddress(gpa.0.saturating_add(len));
        Ok(gpa)
    }

    fn remove_hidden_memory(&mut self, _gpa: GuestAddress) -> Result<(), MachineError> {
        Ok(())
    }

    fn interrupt(&mut self, _index: u32, _vector: u8) -> Result<(), MachineError> {
        Err(MachineError::Interrupt("a check sends none".into()))
    }
}
