//! Every step that changes a guest fails in turn: whatever was asked for is then undone or was not begun, the guest is as it was and
//! runs, and the same asked again is done as if nothing had been.
//!
//! The guest is a stock kernel's, dumped in the bed; what is tried on the dump runs on the host, where nothing is emulated.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use introspect::CoreFile;
use patcher::{Mode, PatchError, PatchPhase, Patcher};
use tests::core_machine::CoreMachine;

use crate::{
    Scenario,
    bench::{Assets, Bench},
};

/// The dump, in the scenario's scratch folder.
const CORE: &str = "faults.core";
/// A guest that is small: its memory is read many times.
const MEMORY_MIB: u32 = 256;
/// Looks that a transition may take here, where nobody moves but by us.
const MOST_LOOKS: u32 = 20;

/// What is asked for, one after the other.
#[derive(Clone, Copy, Debug)]
enum Call {
    Apply(Mode),
    /// One look at the running transition.
    Look,
    /// Looks until no transition runs.
    Finish,
    Signal,
    Cancel,
    Force,
    Revert(Mode),
}

/// What happens to one patch, from a guest without it to a guest without it.
struct Story {
    file: &'static str,
    name: &'static str,
    calls: &'static [Call],
}

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
            Scenario::new(format!("faults::every_step_{generation}"), move |bench| {
                hand_over(bench, generation)
            })
            .then(move |assets, folder| every_story(assets, folder, generation))
            .more(generation != "7.3")
        })
        .into()
}

/// In the bed: a guest with sleepers, dumped.
fn hand_over(bench: &Bench, generation: &str) -> Result<()> {
    let guest = bench.boot_with(generation, 2, MEMORY_MIB, "")?;
    bench.with(guest, |guest| {
        guest.sh("sleeper 10 & sleep 1")?;
        let core = bench.scratch().join(CORE);
        let file = core.to_str().context("a scratch folder in UTF-8")?;
        guest.outpatch().ok(&["dump", file]).map(drop)
    })
}

/// On the host.
fn every_story(assets: &Assets, folder: &Path, generation: &str) -> Result<()> {
    let stock = assets.stock.get(generation).context("no such kernel")?;
    let mut machine = CoreMachine::load(&CoreFile::open(&folder.join(CORE))?)?;
    for story in &STORIES {
        let file = fs::read(stock.patch(story.file)?)?;
        let tried = every_step(&mut machine, story, &file)
            .with_context(|| format!("{generation}: {:?}", story.calls))?;
        println!(
            "{generation}: {}: each of {tried} steps failed once, {:?}",
            story.name, story.calls
        );
    }
    Ok(())
}

/// How many steps there were to fail.
fn every_step(machine: &mut CoreMachine, story: &Story, file: &[u8]) -> Result<u64> {
    machine.restore()?;
    let end = tell(machine, story, file, None).context("with no fault")?;
    ensure!(end.failed == 0, "{} calls failed by themselves", end.failed);
    for step in 0..end.steps {
        machine.restore()?;
        let now = tell(machine, story, file, Some(step))
            .with_context(|| format!("step {step} of {}", end.steps))?;
        ensure!(
            now.changes == end.changes,
            "step {step}: the guest ends otherwise"
        );
        // What fails without a word is only what need not succeed: an interrupt that hastens things. And where all was done and
        // the guest then does not go on, that is no reason to say that it was not done.
        let call = machine.failed().context("nothing failed")?;
        let silent = ["interrupt", "resume"].contains(&call);
        ensure!(
            now.failed == 1 || silent,
            "step {step}: {call} failed and nobody was told"
        );
    }
    Ok(end.steps)
}

/// How a story ended.
struct End {
    steps: u64,
    failed: u64,
    changes: Vec<(u64, Vec<u8>)>,
}

fn tell(
    machine: &mut CoreMachine,
    story: &Story,
    file: &[u8],
    fail_at: Option<u64>,
) -> Result<End> {
    let mut patcher = Patcher::new();
    machine.fail_at(fail_at);
    let mut failed = 0;
    for call in story.calls {
        failed += u64::from(!one(machine, &mut patcher, story, file, *call)?);
    }
    let left = patcher
        .status()
        .iter()
        .any(|patch| patch.phase != PatchPhase::Reverted);
    ensure!(!left, "{:?}", patcher.status());
    Ok(End {
        steps: machine.steps(),
        failed,
        changes: machine.changes_since(&BTreeMap::new())?,
    })
}

/// One call, and once more if it failed. False: it did fail.
fn one(
    machine: &mut CoreMachine,
    patcher: &mut Patcher,
    story: &Story,
    file: &[u8],
    call: Call,
) -> Result<bool> {
    let before = machine.written()?;
    let first = make(machine, patcher, story, file, call);
    ensure!(machine.runs(), "after {call:?} the guest stands");
    let Err(error) = first else {
        return Ok(true);
    };
    ensure!(
        !matches!(error, PatchError::Undo { .. }),
        "{call:?}: {error}"
    );
    // A call of several looks fails between two of them.
    if !matches!(call, Call::Finish) {
        let changes = machine.changes_since(&before)?;
        ensure!(
            changes.is_empty(),
            "{call:?} failed ({error}) and left {changes:x?}"
        );
    }
    match make(machine, patcher, story, file, call) {
        Ok(()) => Ok(false),
        Err(again) => bail!("{call:?} failed ({error}), and again: {again}"),
    }
}

fn make(
    machine: &mut CoreMachine,
    patcher: &mut Patcher,
    story: &Story,
    file: &[u8],
    call: Call,
) -> Result<(), PatchError> {
    match call {
        Call::Apply(mode) => patcher.apply(machine, file, mode).map(drop),
        Call::Look => patcher.poll(machine).map(drop),
        Call::Finish => {
            for _ in 0..MOST_LOOKS {
                if patcher.poll(machine)?.is_none() {
                    break;
                }
            }
            Ok(())
        }
        Call::Signal => patcher.signal(machine, story.name, Duration::ZERO),
        Call::Cancel => patcher.cancel(machine, story.name),
        Call::Force => patcher.force(machine, story.name),
        Call::Revert(mode) => patcher.revert(machine, story.name, mode),
    }
}
