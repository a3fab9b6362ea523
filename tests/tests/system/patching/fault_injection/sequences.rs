//! Sequences of calls in a guest in which a step is made to fail, and what must hold then.
//!
//! This module knows the calls and what is checked around each; it must not know what kind of guest
//! it is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use patcher::{Machine, Mode, PatchError, PatchPhase, Patcher};
use tests::fault_machine::FaultMachine;

/// How many pauses a transition may take: it completes by itself, or was kept from completing only
/// by tasks that then left the function.
const MAX_PAUSES: u32 = 20;

/// A call to the patcher.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Apply(Mode),
    /// One pause of the running transition.
    Poll,
    /// Pauses until no transition is running.
    Complete,
    /// The fake signal, if a transition is still running.
    Signal,
    Cancel,
    Force,
    Revert(Mode),
}

/// Where a sequence is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the core file of a guest, in which nothing runs.
    Core,
    /// In a running guest under load.
    LiveGuest,
}

/// Calls for one patch, from a guest without it to a guest without it.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub place: Place,
    /// The patch's file, without `.ko`.
    pub file: &'static str,
    /// The name of its module.
    pub name: &'static str,
    pub calls: &'static [Call],
}

/// The patch whose function no task of the core file is in.
pub const SAMPLE: &str = "livepatch-sample";

/// All sequences. Sleepers are in the function of `pause`, and keep its transition from completing
/// until they are signalled, or the transition is cancelled or forced. In the running guest, tasks
/// call the function of `getpid` all the time.
const SEQUENCES: [Sequence; 6] = [
    Sequence {
        place: Place::Core,
        file: SAMPLE,
        name: "livepatch_sample",
        calls: &[
            Call::Apply(Mode::StopMachine),
            Call::Revert(Mode::StopMachine),
        ],
    },
    Sequence {
        place: Place::Core,
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Poll,
            Call::Signal,
            Call::Poll,
            Call::Cancel,
            Call::Complete,
        ],
    },
    Sequence {
        place: Place::Core,
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Force,
            Call::Complete,
            Call::Revert(Mode::PerTask),
            Call::Complete,
        ],
    },
    Sequence {
        place: Place::LiveGuest,
        file: "getpid",
        name: "getpid",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Complete,
            Call::Revert(Mode::PerTask),
            Call::Complete,
        ],
    },
    Sequence {
        place: Place::LiveGuest,
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Poll,
            Call::Cancel,
            Call::Complete,
        ],
    },
    Sequence {
        place: Place::LiveGuest,
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Signal,
            Call::Complete,
            Call::Revert(Mode::PerTask),
            Call::Signal,
            Call::Complete,
        ],
    },
];

/// The sequences that are tried in one kind of guest.
pub fn all(place: Place) -> impl Iterator<Item = &'static Sequence> {
    SEQUENCES
        .iter()
        .filter(move |sequence| sequence.place == place)
}

/// A guest in which a sequence is tried.
pub trait FaultyGuest {
    type Machine: Machine;

    /// What calls are made with.
    fn parts(&mut self) -> (&mut FaultMachine<Self::Machine>, &mut Patcher);
    /// Waits between two pauses.
    fn wait(&self, delay: Duration);
    /// Takes a snapshot of what a call that fails must not change.
    fn take_snapshot(&mut self) -> Result<()>;
    /// Checks that this has not changed since.
    fn expect_unchanged(&mut self) -> Result<()>;
    /// Checks that the guest runs.
    fn expect_running(&mut self) -> Result<()>;
}

/// Makes the calls of the sequence. Returns how many of them failed; each of those was made once
/// more, and succeeded.
pub fn run(guest: &mut impl FaultyGuest, sequence: &Sequence, module: &[u8]) -> Result<u64> {
    let mut failed = 0;
    for call in sequence.calls {
        failed += u64::from(!succeeds_at_once(guest, sequence, module, *call)?);
    }
    let (_, patcher) = guest.parts();
    let status = patcher.status();
    let left = (status.iter()).any(|patch| patch.phase != PatchPhase::Reverted);
    ensure!(!left, "{status:?}");
    Ok(failed)
}

/// Makes a call, and once more if it failed: then false.
fn succeeds_at_once(
    guest: &mut impl FaultyGuest,
    sequence: &Sequence,
    module: &[u8],
    call: Call,
) -> Result<bool> {
    guest.take_snapshot()?;
    let first = make(guest, sequence, module, call);
    let running = guest.expect_running();
    running.with_context(|| format!("after {call:?}"))?;
    let Err(error) = first else {
        return Ok(true);
    };
    ensure!(
        !matches!(error, PatchError::Undo { .. }),
        "{call:?}: {error}"
    );
    // A call with several pauses fails between two of them.
    if !matches!(call, Call::Complete) {
        let unchanged = guest.expect_unchanged();
        unchanged.with_context(|| format!("{call:?} failed ({error})"))?;
    }
    match make(guest, sequence, module, call) {
        Ok(()) => Ok(false),
        Err(second) => bail!("{call:?} failed ({error}), and once more: {second}"),
    }
}

fn make(
    guest: &mut impl FaultyGuest,
    sequence: &Sequence,
    module: &[u8],
    call: Call,
) -> Result<(), PatchError> {
    let (machine, patcher) = guest.parts();
    match call {
        Call::Apply(mode) => patcher.apply(machine, module, mode).map(drop),
        Call::Poll => patcher.poll(machine),
        Call::Complete => complete(guest),
        Call::Signal if !patcher.status().iter().any(|patch| patch.transition) => Ok(()),
        Call::Signal => patcher.signal(machine, sequence.name, Duration::ZERO),
        Call::Cancel => patcher.cancel(machine, sequence.name),
        Call::Force => patcher.force(machine, sequence.name),
        Call::Revert(mode) => patcher.revert(machine, sequence.name, mode),
    }
}

fn complete(guest: &mut impl FaultyGuest) -> Result<(), PatchError> {
    for _ in 0..MAX_PAUSES {
        let (machine, patcher) = guest.parts();
        patcher.poll(machine)?;
        match patcher.due() {
            Some(due) => guest.wait(due.saturating_duration_since(Instant::now())),
            None => break,
        }
    }
    Ok(())
}

/// Checks that a failure was reported: `failed` calls of a sequence failed in which a `call` to the
/// machine was made to fail. Only what need not succeed may fail without a report: an interrupt,
/// which only makes tasks switch sooner; and a resume after all was done, which does not mean that
/// it was not done.
pub fn expect_reported(failed: u64, call: &str) -> Result<()> {
    let silent = ["interrupt", "resume"].contains(&call);
    ensure!(
        failed == 1 || silent,
        "{call} failed and no call reported it"
    );
    Ok(())
}
