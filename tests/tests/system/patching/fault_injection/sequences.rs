//! What is asked for in a guest in which a step is to fail, and what has to hold then.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use patcher::{Machine, Mode, PatchError, PatchPhase, Patcher};
use tests::fault_machine::FaultMachine;

/// Looks that a transition may take: it goes to its end by itself, or was kept from it only by what then left.
const MOST_LOOKS: u32 = 20;

/// What is asked for, one after the other.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Apply(Mode),
    /// One look at the running transition.
    Look,
    /// Looks until no transition runs.
    Finish,
    /// The fake signal, if a transition runs still.
    Signal,
    Cancel,
    Force,
    Revert(Mode),
}

/// What happens to one patch, from a guest without it to a guest without it.
#[derive(Clone, Copy, Debug)]
pub struct Story {
    pub file: &'static str,
    pub name: &'static str,
    pub calls: &'static [Call],
}

/// A guest in which it happens.
pub trait Subject {
    type Machine: Machine;

    /// What calls are made with.
    fn parts(&mut self) -> (&mut FaultMachine<Self::Machine>, &mut Patcher);
    /// Between two looks.
    fn wait(&self, later: Duration);
    /// Notes what a call that fails must leave alone.
    fn note(&mut self) -> Result<()>;
    /// Nothing of that has changed.
    fn unchanged(&mut self) -> Result<()>;
    /// The guest runs.
    fn runs(&mut self) -> Result<()>;
}

/// How many calls of the story failed: those that did were made once more, and done.
pub fn tell(subject: &mut impl Subject, story: &Story, module: &[u8]) -> Result<u64> {
    let mut failed = 0;
    for call in story.calls {
        failed += u64::from(!one(subject, story, module, *call)?);
    }
    let (_, patcher) = subject.parts();
    let status = patcher.status();
    let left = (status.iter()).any(|patch| patch.phase != PatchPhase::Reverted);
    ensure!(!left, "{status:?}");
    Ok(failed)
}

/// One call, and once more if it failed. False: it did fail.
fn one(subject: &mut impl Subject, story: &Story, module: &[u8], call: Call) -> Result<bool> {
    subject.note()?;
    let first = make(subject, story, module, call);
    subject.runs().with_context(|| format!("after {call:?}"))?;
    let Err(error) = first else {
        return Ok(true);
    };
    ensure!(
        !matches!(error, PatchError::Undo { .. }),
        "{call:?}: {error}"
    );
    // A call of several looks fails between two of them.
    if !matches!(call, Call::Finish) {
        let unchanged = subject.unchanged();
        unchanged.with_context(|| format!("{call:?} failed ({error})"))?;
    }
    match make(subject, story, module, call) {
        Ok(()) => Ok(false),
        Err(again) => bail!("{call:?} failed ({error}), and again: {again}"),
    }
}

fn make(
    subject: &mut impl Subject,
    story: &Story,
    module: &[u8],
    call: Call,
) -> Result<(), PatchError> {
    let (machine, patcher) = subject.parts();
    match call {
        Call::Apply(mode) => patcher.apply(machine, module, mode).map(drop),
        Call::Look => patcher.poll(machine),
        Call::Finish => finish(subject),
        Call::Signal if !patcher.status().iter().any(|patch| patch.transition) => Ok(()),
        Call::Signal => patcher.signal(machine, story.name, Duration::ZERO),
        Call::Cancel => patcher.cancel(machine, story.name),
        Call::Force => patcher.force(machine, story.name),
        Call::Revert(mode) => patcher.revert(machine, story.name, mode),
    }
}

fn finish(subject: &mut impl Subject) -> Result<(), PatchError> {
    for _ in 0..MOST_LOOKS {
        let (machine, patcher) = subject.parts();
        patcher.poll(machine)?;
        match patcher.due() {
            Some(due) => subject.wait(due.saturating_duration_since(Instant::now())),
            None => break,
        }
    }
    Ok(())
}

/// `failed` calls failed of a story in which a `call` to the machine was made to. What may fail without a word is only what need not
/// succeed: an interrupt that hastens things. And where all was done and the guest then does not go on, that is no reason to say that
/// it was not done.
pub fn somebody_was_told(failed: u64, call: &str) -> Result<()> {
    let silent = ["interrupt", "resume"].contains(&call);
    ensure!(failed == 1 || silent, "{call} failed and nobody was told");
    Ok(())
}
