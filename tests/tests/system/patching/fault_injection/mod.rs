//! Every step that changes a guest fails in turn: the call is then undone or was not started, the
//! guest is as it was and runs, and the same call made once more succeeds as if nothing had failed.
//!
//! The guest is a stock kernel's, dumped in the bed; the core file is patched on the host, where
//! nothing is emulated. There all memory can be compared with what it was. That a guest runs on
//! afterwards is checked in one that runs ([`live`]).

pub mod live;
mod sequences;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use introspect::CoreFile;
use patcher::{ErrorKind, Patcher};
use tests::core_machine::CoreMachine;
use tests::fault_machine::FaultMachine;

use self::sequences::{FaultyGuest, Place, SAMPLE, Sequence, expect_reported, run};
use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// The core file, in the scenario's scratch folder.
const CORE: &str = "faults.core";
/// How many core files are written at most until all tasks can switch in one.
const MAX_DUMPS: usize = 10;
/// How long a kernel thread takes at most to sleep again after it woke up for a moment.
const BETWEEN_DUMPS: Duration = Duration::from_millis(30);
/// A small guest: its memory is read many times.
const MEMORY_MIB: u32 = 256;

pub fn scenarios() -> Vec<Scenario> {
    ["6.1", "6.12", "7.3"]
        .map(|generation| {
            let name = format!("fault_injection::every_step_{generation}");
            Scenario::new(name, move |fixture| hand_over(fixture, generation))
                .then(move |assets, folder| all_sequences(assets, folder, generation))
                .extra_if(generation != "7.3")
        })
        .into_iter()
        .chain(live::scenarios())
        .collect()
}

/// In the bed: dumps a guest with sleepers.
fn hand_over(fixture: &Fixture, generation: &str) -> Result<()> {
    let guest = fixture.boot_with(generation, 2, MEMORY_MIB, "")?;
    fixture.with(guest, |guest| {
        guest.sh("sleeper 10 & sleep 1")?;
        let kernel = fixture.kernel(generation)?;
        let module = fs::read(kernel.patch(SAMPLE)?)?;
        let core = fixture.scratch().join(CORE);
        let file = core.to_str().context("a scratch folder in UTF-8")?;
        let mut reason = String::new();
        for _ in 0..MAX_DUMPS {
            guest.outpatch().ok(&["dump", file])?;
            reason = match blocked_by(&core, &module)? {
                None => return Ok(()),
                Some(reason) => reason,
            };
            fs::remove_file(&core)?;
            thread::sleep(BETWEEN_DUMPS);
        }
        bail!("in none of {MAX_DUMPS} core files could all tasks switch: {reason}")
    })
}

/// Why not all tasks of a core file can switch at once, if so: the guest may have been dumped while
/// a kernel thread was in code in which its stack is not reliable, and in a core file it never
/// leaves that code.
fn blocked_by(core: &Path, module: &[u8]) -> Result<Option<String>> {
    let mut machine = CoreMachine::load(&CoreFile::open(core)?)?;
    match Patcher::new().check(&mut machine, module) {
        Ok(report) if report.at_once => Ok(None),
        Ok(report) => Ok(Some(format!("{:?}", report.tasks))),
        Err(busy) if busy.kind() == ErrorKind::Busy => Ok(Some(busy.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// On the host: tries every sequence in the core file.
fn all_sequences(assets: &Assets, folder: &Path, generation: &str) -> Result<()> {
    let kernel = assets.kernel(generation)?;
    let core = CoreFile::open(&folder.join(CORE))?;
    let mut guest = CoreGuest {
        machine: FaultMachine::new(CoreMachine::load(&core)?),
        patcher: Patcher::new(),
        before: BTreeMap::new(),
    };
    for sequence in sequences::all(Place::Core) {
        let file = fs::read(kernel.patch(sequence.file)?)?;
        let steps = every_step(&mut guest, sequence, &file)
            .with_context(|| format!("{generation}: {:?}", sequence.calls))?;
        println!(
            "{generation}: {}: each of {steps} steps failed once, {:?}",
            sequence.name, sequence.calls
        );
    }
    Ok(())
}

/// Runs the sequence once for each of its steps, which fails. Returns how many steps there are.
fn every_step(guest: &mut CoreGuest, sequence: &Sequence, module: &[u8]) -> Result<u64> {
    guest.start(None)?;
    let failed = run(guest, sequence, module).context("with no fault")?;
    ensure!(failed == 0, "{failed} calls failed by themselves");
    let steps = guest.machine.steps();
    let changes = guest.changes()?;
    for step in 0..steps {
        let place = || format!("step {step} of {steps}");
        guest.start(Some(step))?;
        let failed = run(guest, sequence, module).with_context(place)?;
        ensure!(
            guest.changes()? == changes,
            "step {step}: the guest's memory is different at the end"
        );
        let call = guest.machine.failed().context("nothing failed")?;
        expect_reported(failed, call).with_context(place)?;
    }
    Ok(steps)
}

/// A guest from a core file.
struct CoreGuest {
    machine: FaultMachine<CoreMachine>,
    patcher: Patcher,
    /// The pages written so far, before the call that is made.
    before: BTreeMap<u64, Vec<u8>>,
}

impl CoreGuest {
    /// Restores the guest as it was dumped, with a patcher that knows nothing of it.
    fn start(&mut self, fail_at: Option<u64>) -> Result<()> {
        self.machine.get_mut().restore()?;
        self.machine.fail_at(fail_at);
        self.patcher = Patcher::new();
        Ok(())
    }

    fn changes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        self.machine.get().changes_since(&BTreeMap::new())
    }
}

impl FaultyGuest for CoreGuest {
    type Machine = CoreMachine;

    fn parts(&mut self) -> (&mut FaultMachine<CoreMachine>, &mut Patcher) {
        (&mut self.machine, &mut self.patcher)
    }

    fn wait(&self, _delay: Duration) {}

    fn take_snapshot(&mut self) -> Result<()> {
        self.before = self.machine.get().written()?;
        Ok(())
    }

    fn expect_unchanged(&mut self) -> Result<()> {
        let changes = self.machine.get().changes_since(&self.before)?;
        ensure!(changes.is_empty(), "it left {changes:x?}");
        Ok(())
    }

    fn expect_running(&mut self) -> Result<()> {
        ensure!(self.machine.get().runs(), "the guest is paused");
        Ok(())
    }
}
