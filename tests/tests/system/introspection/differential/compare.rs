//! The comparison on the host: reads each core file that the scenario in the bed hands over with
//! drgn and with introspect, and compares the results.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use guests::external::drgn::Drgn;
use guests::host::cache::Cache;
use guests::kernel::Generation;
use introspect::{Stack, Task, Verdict};

use crate::harness::kept_cores;

use super::drgn::{DrgnProcess, DrgnTask};
use super::introspected::IntrospectedCore;
use super::{LOCKED, crash};

/// How many differences an error shows.
const MAX_SHOWN: usize = 5;

/// What was compared, and the results.
#[derive(Debug, Default)]
struct Counts {
    /// Core files.
    pauses: u64,
    /// Core files in which a lock was held, by lock.
    busy: BTreeMap<&'static str, u64>,
    /// Tasks that both list.
    tasks: u64,
    /// Reliable stacks that equal drgn's.
    equal: u64,
    /// The frames on these stacks.
    frames: u64,
    /// How many of these stacks are of tasks that a vCPU ran.
    running: u64,
    /// The return addresses on these stacks that a tracer had replaced.
    recovered: u64,
    /// Unreliable stacks, by reason.
    unreliable: BTreeMap<String, u64>,
    /// Descriptions of all differences.
    differences: Vec<String>,
}

/// Compares core files as they come, until `ended` is set and none is left, then prints the counts.
///
/// At most one in `unreliable_bound` stacks may be unreliable.
///
/// # Errors
/// When a set of tasks or a reliable stack differs, or when too few stacks could be compared.
pub fn all(
    generation: Generation,
    vmlinux: &Path,
    unreliable_bound: u64,
    cores: &Path,
    ended: &AtomicBool,
) -> Result<()> {
    let mut drgn = DrgnProcess::start(&Drgn::fetch(&Cache::open()?)?, vmlinux)?;
    let mut counts = Counts::default();
    let mut crash_compared = false;
    loop {
        let last = ended.load(Ordering::Acquire);
        let mut waiting = finished_cores(cores)?;
        waiting.sort_unstable();
        for core in &waiting {
            let compared = compare_core(core, &mut drgn, &mut counts);
            let introspected =
                compared.with_context(|| format!("{generation}: pause {}", counts.pauses))?;
            if let (Some(introspected), false) = (introspected, crash_compared) {
                crash::compare(generation, vmlinux, core, &introspected)?;
                crash_compared = true;
            }
            fs::remove_file(core)?;
        }
        if last && waiting.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    counts.report(generation);
    counts.verdict(unreliable_bound)
}

fn finished_cores(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    let paths = entries.into_iter().map(|entry| entry.path());
    Ok(paths
        .filter(|path| path.extension().is_some_and(|end| end == "core"))
        .collect())
}

/// Compares one core file. Returns what introspect read from it, if no lock was held.
fn compare_core(
    core: &Path,
    drgn: &mut DrgnProcess,
    counts: &mut Counts,
) -> Result<Option<IntrospectedCore>> {
    counts.pauses += 1;
    let introspected = match IntrospectedCore::read(core)? {
        Ok(introspected) => introspected,
        Err(lock) => {
            *counts.busy.entry(lock).or_default() += 1;
            report_locked(core)?;
            return Ok(None);
        }
    };
    let drgn_tasks = drgn.tasks(core)?;
    let before = counts.differences.len();
    for (address, drgn_task) in &drgn_tasks {
        match introspected.tasks.get(address) {
            Some((task, stack)) => counts.stack(&introspected, task, stack, drgn_task),
            None if drgn_task.listed => counts.differences.push(format!(
                "only drgn has the task {} {} at {address:#x}",
                drgn_task.pid, drgn_task.comm
            )),
            // In a context switch a CPU's current task differs between run queue and CPU.
            None => {}
        }
    }
    for (address, (task, _)) in &introspected.tasks {
        if !drgn_tasks.contains_key(address) {
            counts.differences.push(format!(
                "only introspect has the task {} {} at {address:#x}",
                task.pid, task.comm
            ));
        }
    }
    if counts.differences.len() > before {
        kept_cores::keep(core)?;
    }
    Ok(Some(introspected))
}

/// Reports to the scenario in the bed that this pause compares nothing.
fn report_locked(core: &Path) -> Result<()> {
    let locked = core.with_file_name(LOCKED);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(locked)?;
    Ok(file.write_all(b"!")?)
}

impl Counts {
    /// Compares a task that both list, and its stack.
    fn stack(
        &mut self,
        introspected: &IntrospectedCore,
        task: &Task,
        stack: &Stack,
        drgn_task: &DrgnTask,
    ) {
        self.tasks += 1;
        if (task.pid, task.comm.as_str()) != (drgn_task.pid, drgn_task.comm.as_str()) {
            self.differences.push(format!(
                "{} {} is {} {} for drgn",
                task.pid, task.comm, drgn_task.pid, drgn_task.comm
            ));
        }
        match &stack.verdict {
            Verdict::Unreliable(reason) => {
                let reason = reason_without_address(&reason.to_string());
                *self.unreliable.entry(reason).or_default() += 1;
            }
            Verdict::Reliable => {
                let frames: Vec<u64> = stack.frames.iter().map(|frame| frame.ip.0).collect();
                if drgn_task.frames.as_deref().unwrap_or_default() == frames {
                    self.equal += 1;
                    self.frames += frames.len() as u64;
                    self.running += u64::from(task.vcpu.is_some());
                    self.recovered += drgn_task.recovered;
                } else {
                    self.differences
                        .push(side_by_side(introspected, task, &frames, drgn_task));
                }
            }
        }
    }

    fn report(&self, generation: Generation) {
        println!(
            "{generation}: {} pauses, {} of them with a lock held {:?}; {} tasks, the same as \
             drgn's; {} stacks equal drgn's, frame by frame ({} frames, {} of them at \
             addresses that a tracer had replaced; {} stacks of running tasks); unreliable: {:?}; differences: {}",
            self.pauses,
            self.busy.values().sum::<u64>(),
            self.busy,
            self.tasks,
            self.equal,
            self.frames,
            self.recovered,
            self.running,
            self.unreliable,
            self.differences.len()
        );
    }

    fn verdict(&self, unreliable_bound: u64) -> Result<()> {
        if !self.differences.is_empty() {
            let shown = self.differences.iter().take(MAX_SHOWN);
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
            unreliable * unreliable_bound <= self.tasks,
            "{unreliable} of {} stacks unreliable: too few were compared",
            self.tasks
        );
        ensure!(self.running > 0, "no running task was compared");
        ensure!(
            self.recovered > self.pauses,
            "only {} replaced addresses were compared",
            self.recovered
        );
        Ok(())
    }
}

/// A reason without the addresses in it, which differ from stack to stack.
fn reason_without_address(reason: &str) -> String {
    let words = reason.split(' ');
    let words: Vec<&str> = words
        .map(|word| if word.starts_with("0x") { "…" } else { word })
        .collect();
    words.join(" ")
}

fn side_by_side(
    introspected: &IntrospectedCore,
    task: &Task,
    frames: &[u64],
    drgn_task: &DrgnTask,
) -> String {
    let names = |frames: &[u64]| -> String {
        let names: Vec<String> = frames.iter().map(|ip| introspected.name(*ip)).collect();
        names.join(" < ")
    };
    let drgn = match (&drgn_task.frames, &drgn_task.why) {
        (Some(frames), _) => names(frames),
        (None, why) => format!("none ({})", why.as_deref().unwrap_or_default()),
    };
    format!(
        "{} {} ({}, vCPU {:?}):\n  introspect  {}\n  drgn        {drgn}",
        task.pid,
        task.comm,
        task.state_letter(),
        task.vcpu,
        names(frames)
    )
}
