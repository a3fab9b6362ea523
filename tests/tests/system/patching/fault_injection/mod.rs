//! Every step that changes a guest fails in turn: whatever was asked for is then undone or was not begun, the guest is as it was and
//! runs, and the same asked again is done as if nothing had been.
//!
//! The guest is a stock kernel's, dumped in the bed; what is tried on the dump runs on the host, where nothing is emulated. There all
//! memory can be held against what it was. That a guest lives on is tried on one that runs ([`live`]).

pub mod live;
mod sequences;

use std::{collections::BTreeMap, fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use introspect::CoreFile;
use patcher::{ErrorKind, Mode, Patcher};
use tests::{core_machine::CoreMachine, fault_machine::FaultMachine};

use self::sequences::{Call, Story, Subject, somebody_was_told, tell};
use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// The dump, in the scenario's scratch folder.
const CORE: &str = "faults.core";
/// So many are made until all tasks are where they can be moved.
const DUMPS: usize = 10;
/// A kernel thread that wakes up for a moment has gone to sleep after this.
const BETWEEN_DUMPS: Duration = Duration::from_millis(30);
/// A guest that is small: its memory is read many times.
const MEMORY_MIB: u32 = 256;
const STORIES: [Story; 3] = [
    Story {
        file: "livepatch-sample",
        name: "livepatch_sample",
        calls: &[
            Call::Apply(Mode::StopMachine),
            Call::Revert(Mode::StopMachine),
        ],
    },
    // Three tasks sleep in the function.
    Story {
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Look,
            Call::Signal,
            Call::Look,
            Call::Cancel,
            Call::Finish,
        ],
    },
    Story {
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Force,
            Call::Finish,
            Call::Revert(Mode::PerTask),
            Call::Finish,
        ],
    },
];

pub fn scenarios() -> Vec<Scenario> {
    ["6.1", "6.12", "7.3"]
        .map(|generation| {
            Scenario::new(
                format!("fault_injection::every_step_{generation}"),
                move |fixture| hand_over(fixture, generation),
            )
            .then(move |assets, folder| every_story(assets, folder, generation))
            .extra_if(generation != "7.3")
        })
        .into_iter()
        .chain(live::scenarios())
        .collect()
}

/// In the bed: a guest with sleepers, dumped.
fn hand_over(fixture: &Fixture, generation: &str) -> Result<()> {
    let guest = fixture.boot_with(generation, 2, MEMORY_MIB, "")?;
    fixture.with(guest, |guest| {
        guest.sh("sleeper 10 & sleep 1")?;
        let kernel = fixture.kernel(generation)?;
        let module = fs::read(kernel.patch(STORIES[0].file)?)?;
        let core = fixture.scratch().join(CORE);
        let file = core.to_str().context("a scratch folder in UTF-8")?;
        let mut why = String::new();
        for _ in 0..DUMPS {
            guest.outpatch().ok(&["dump", file])?;
            why = match in_the_way(&core, &module)? {
                None => return Ok(()),
                Some(why) => why,
            };
            fs::remove_file(&core)?;
            thread::sleep(BETWEEN_DUMPS);
        }
        bail!("in none of {DUMPS} moments could all tasks be moved: {why}")
    })
}

/// Why not all tasks of a dump can be moved at once: a dump can be of a moment in which some kernel thread runs through code that no
/// stack can be relied on in, and the guest in it never gets on.
fn in_the_way(core: &Path, module: &[u8]) -> Result<Option<String>> {
    let mut machine = CoreMachine::load(&CoreFile::open(core)?)?;
    match Patcher::new().check(&mut machine, module) {
        Ok(report) if report.at_once => Ok(None),
        Ok(report) => Ok(Some(format!("{:?}", report.tasks))),
        Err(busy) if busy.kind() == ErrorKind::Busy => Ok(Some(busy.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// On the host.
fn every_story(assets: &Assets, folder: &Path, generation: &str) -> Result<()> {
    let kernel = assets.kernels.get(generation).context("no such kernel")?;
    let core = CoreFile::open(&folder.join(CORE))?;
    let mut dump = Dump {
        machine: FaultMachine::new(CoreMachine::load(&core)?),
        patcher: Patcher::new(),
        before: BTreeMap::new(),
    };
    for story in &STORIES {
        let file = fs::read(kernel.patch(story.file)?)?;
        let tried = every_step(&mut dump, story, &file)
            .with_context(|| format!("{generation}: {:?}", story.calls))?;
        println!(
            "{generation}: {}: each of {tried} steps failed once, {:?}",
            story.name, story.calls
        );
    }
    Ok(())
}

/// How many steps there were to fail.
fn every_step(dump: &mut Dump, story: &Story, module: &[u8]) -> Result<u64> {
    dump.begin(None)?;
    let failed = tell(dump, story, module).context("with no fault")?;
    ensure!(failed == 0, "{failed} calls failed by themselves");
    let steps = dump.machine.steps();
    let changes = dump.changes()?;
    for step in 0..steps {
        let place = || format!("step {step} of {steps}");
        dump.begin(Some(step))?;
        let failed = tell(dump, story, module).with_context(place)?;
        ensure!(
            dump.changes()? == changes,
            "step {step}: the guest ends otherwise"
        );
        let call = dump.machine.failed().context("nothing failed")?;
        somebody_was_told(failed, call).with_context(place)?;
    }
    Ok(steps)
}

/// A guest out of a dump.
struct Dump {
    machine: FaultMachine<CoreMachine>,
    patcher: Patcher,
    /// Written pages, before the call that is made.
    before: BTreeMap<u64, Vec<u8>>,
}

impl Dump {
    /// As it was dumped, with nothing known of it.
    fn begin(&mut self, fail_at: Option<u64>) -> Result<()> {
        self.machine.get_mut().restore()?;
        self.machine.fail_at(fail_at);
        self.patcher = Patcher::new();
        Ok(())
    }

    fn changes(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        self.machine.get().changes_since(&BTreeMap::new())
    }
}

impl Subject for Dump {
    type Machine = CoreMachine;

    fn parts(&mut self) -> (&mut FaultMachine<CoreMachine>, &mut Patcher) {
        (&mut self.machine, &mut self.patcher)
    }

    fn wait(&self, _later: Duration) {}

    fn note(&mut self) -> Result<()> {
        self.before = self.machine.get().written()?;
        Ok(())
    }

    fn unchanged(&mut self) -> Result<()> {
        let changes = self.machine.get().changes_since(&self.before)?;
        ensure!(changes.is_empty(), "it left {changes:x?}");
        Ok(())
    }

    fn runs(&mut self) -> Result<()> {
        ensure!(self.machine.get().runs(), "the guest stands");
        Ok(())
    }
}
