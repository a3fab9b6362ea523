//! The judge: on the host, takes each core file that the scenario in the bed hands over, asks drgn and introspect, compares.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use guests::external::drgn::Drgn;
use guests::host::cache::Cache;
use guests::kernel::Generation;
use introspect::{Stack, Task, Verdict};

use crate::harness::kept_cores;

use super::drgn::{Oracle, Told};
use super::introspected::Ours;
use super::{LOCKED, crash};

/// A difference is told in full so many times.
const TOLD_IN_FULL: usize = 5;

/// What was compared, and how it came out.
#[derive(Debug, Default)]
struct Counts {
    pauses: u64,
    busy: BTreeMap<&'static str, u64>,
    tasks: u64,
    /// Reliable stacks that equal drgn's, and their frames.
    equal: u64,
    frames: u64,
    /// Of these, stacks of tasks that a vCPU ran.
    running: u64,
    /// Unreliable stacks, by reason.
    unreliable: BTreeMap<String, u64>,
    differences: Vec<String>,
}

/// Compares until `ended` is set and no core is left, then prints the counts.
///
/// # Errors
/// When a set of tasks or a reliable stack differs, or too little could be compared.
pub fn all(generation: Generation, vmlinux: &Path, cores: &Path, ended: &AtomicBool) -> Result<()> {
    let drgn = Drgn::fetch(&Cache::open()?)?;
    let mut oracle = Oracle::start(&drgn, vmlinux)?;
    let mut counts = Counts::default();
    let mut asked_crash = false;
    loop {
        let last = ended.load(Ordering::Acquire);
        let mut waiting = finished_cores(cores)?;
        waiting.sort_unstable();
        for core in &waiting {
            let compared = compare(core, &mut oracle, &mut counts);
            let ours =
                compared.with_context(|| format!("{generation}: pause {}", counts.pauses))?;
            if let (Some(ours), false) = (ours, asked_crash) {
                crash::opens(generation, vmlinux, core, &ours)?;
                asked_crash = true;
            }
            fs::remove_file(core)?;
        }
        if last && waiting.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    counts.report(generation);
    counts.verdict()
}

fn finished_cores(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    let paths = entries.into_iter().map(|entry| entry.path());
    Ok(paths
        .filter(|path| path.extension().is_some_and(|end| end == "core"))
        .collect())
}

/// One core; what introspect says of it, if no lock was held.
fn compare(core: &Path, oracle: &mut Oracle, counts: &mut Counts) -> Result<Option<Ours>> {
    counts.pauses += 1;
    let ours = match Ours::read(core)? {
        Ok(ours) => ours,
        Err(lock) => {
            *counts.busy.entry(lock).or_default() += 1;
            tell_locked(core)?;
            return Ok(None);
        }
    };
    let told = oracle.tasks(core)?;
    let before = counts.differences.len();
    for (address, told) in &told {
        match ours.tasks.get(address) {
            Some((task, stack)) => counts.stack(&ours, task, stack, told),
            None if told.listed => counts.differences.push(format!(
                "only drgn has the task {} {} at {address:#x}",
                told.pid, told.comm
            )),
            // A CPU's current task by the run queue need not be its current task by the CPU: it is being switched.
            None => {}
        }
    }
    for (address, (task, _)) in &ours.tasks {
        if !told.contains_key(address) {
            counts.differences.push(format!(
                "only introspect has the task {} {} at {address:#x}",
                task.pid, task.comm
            ));
        }
    }
    if counts.differences.len() > before {
        kept_cores::keep(core)?;
    }
    Ok(Some(ours))
}

/// Tells the scenario in the bed that this pause compares nothing.
fn tell_locked(core: &Path) -> Result<()> {
    let told = core.with_file_name(LOCKED);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(told)?;
    Ok(file.write_all(b"!")?)
}

impl Counts {
    fn stack(&mut self, ours: &Ours, task: &Task, stack: &Stack, told: &Told) {
        self.tasks += 1;
        if (task.pid, task.comm.as_str()) != (told.pid, told.comm.as_str()) {
            self.differences.push(format!(
                "{} {} is {} {} to drgn",
                task.pid, task.comm, told.pid, told.comm
            ));
        }
        match &stack.verdict {
            Verdict::Unreliable(reason) => {
                let reason = reason_without_address(&reason.to_string());
                *self.unreliable.entry(reason).or_default() += 1;
            }
            Verdict::Reliable => {
                let mine: Vec<u64> = stack.frames.iter().map(|frame| frame.ip.0).collect();
                if told.frames.as_deref().unwrap_or_default() == mine {
                    self.equal += 1;
                    self.frames += mine.len() as u64;
                    self.running += u64::from(task.vcpu.is_some());
                } else {
                    self.differences.push(side_by_side(ours, task, &mine, told));
                }
            }
        }
    }

    fn report(&self, generation: Generation) {
        println!(
            "{generation}: {} pauses, {} of them with a lock held {:?}; {} tasks, the same as drgn's; {} stacks equal drgn's, \
             frame by frame ({} frames, {} stacks of running tasks); unreliable: {:?}; differences: {}",
            self.pauses,
            self.busy.values().sum::<u64>(),
            self.busy,
            self.tasks,
            self.equal,
            self.frames,
            self.running,
            self.unreliable,
            self.differences.len()
        );
    }

    fn verdict(&self) -> Result<()> {
        if !self.differences.is_empty() {
            let shown = self.differences.iter().take(TOLD_IN_FULL);
            let shown: Vec<&str> = shown.map(String::as_str).collect();
            bail!(
                "{} differences from drgn:\n{}",
                self.differences.len(),
                shown.join("\n")
            );
        }
        ensure!(self.tasks > 0, "nothing was compared");
        let unreliable = self.unreliable.values().sum::<u64>();
        ensure!(
            unreliable * 10 <= self.tasks,
            "{unreliable} of {} stacks unreliable: nothing much was compared",
            self.tasks
        );
        ensure!(self.running > 0, "no running task was compared");
        Ok(())
    }
}

/// Addresses differ from stack to stack; the sort of reason counts.
fn reason_without_address(reason: &str) -> String {
    let words = reason.split(' ');
    let words: Vec<&str> = words
        .map(|word| if word.starts_with("0x") { "…" } else { word })
        .collect();
    words.join(" ")
}

fn side_by_side(ours: &Ours, task: &Task, mine: &[u64], told: &Told) -> String {
    let names = |frames: &[u64]| -> String {
        let names: Vec<String> = frames.iter().map(|ip| ours.name(*ip)).collect();
        names.join(" < ")
    };
    let theirs = match (&told.frames, &told.why) {
        (Some(frames), _) => names(frames),
        (None, why) => format!("none ({})", why.as_deref().unwrap_or_default()),
    };
    format!(
        "{} {} ({}, vCPU {:?}):\n  ours  {}\n  drgn  {theirs}",
        task.pid,
        task.comm,
        task.state_letter(),
        task.vcpu,
        names(mine)
    )
}
