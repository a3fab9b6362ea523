//! What Criterion does not print: a table of all measurements, and the memory that is used.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fmt, fs};

use anyhow::{Context, Result, ensure};
use introspect::{CoreFile, PhysMemory, Stack, Task};
use tests::sleeper_cores::Core;

use crate::cpu;
use crate::subject::{self, Subject};

/// The argument with which the bench is started to measure its own memory, before the core file.
pub const PEAK: &str = "--peak-memory-of";

/// The number of runs of which the median is reported.
const RUNS: usize = 21;

/// What was measured on one core file, with its memory mapped or read from the file.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// The number of tasks.
    pub tasks: usize,
    /// The number of frames on their stacks.
    pub frames: usize,
    /// Finding the kernel.
    pub contact: Timing,
    /// Reading the unwind data of kernel and modules, once for a guest.
    pub unwind: Timing,
    /// Listing all tasks.
    pub list: Timing,
    /// Listing all tasks and reading all stacks.
    pub stacks: Timing,
}

/// How long something took: medians of several runs.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The elapsed time.
    pub wall: Duration,
    /// The CPU time of all threads.
    pub cpu: Duration,
}

impl Timing {
    /// The CPU time, in seconds.
    pub fn seconds(&self) -> f64 {
        self.cpu.as_secs_f64()
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let text = format!("{:.2} ({:.2})", ms(self.wall), ms(self.cpu));
        f.pad(&text)
    }
}

impl Figures {
    /// Measures on one core file.
    ///
    /// # Errors
    /// When it does not hold what it should.
    pub fn of(subject: &Subject, memory: &dyn PhysMemory) -> Result<Figures> {
        let vcpus = subject.vcpus();
        let kernel = subject::first_contact(memory, vcpus)?;
        let unwinder = subject::unwind_data(&kernel, memory)?;
        let all = subject::stacks(&kernel, &unwinder, memory, vcpus)?;
        Ok(Figures {
            tasks: all.len(),
            frames: frames(&all),
            contact: time(|| subject::first_contact(memory, vcpus))?,
            unwind: time(|| subject::unwind_data(&kernel, memory))?,
            list: time(|| subject::list(&kernel, memory, vcpus))?,
            stacks: time(|| subject::stacks(&kernel, &unwinder, memory, vcpus))?,
        })
    }

    /// Prints the header of the table.
    pub fn print_header() {
        println!(
            "\nelapsed ms (CPU ms), medians of {RUNS} runs; stacks include the list; \
             ns per stack by CPU time, frames/s by elapsed time"
        );
        println!(
            "{:>8} {:<9} {:>6} {:>7} {:>15} {:>15} {:>15} {:>15} {:>12} {:>9}",
            "sleepers",
            "memory",
            "tasks",
            "frames",
            "contact",
            "unwind data",
            "list",
            "stacks",
            "ns per stack",
            "frames/s"
        );
    }

    /// Prints a line of the table.
    pub fn print(&self, sleepers: u32, memory: &str) {
        println!(
            "{sleepers:>8} {memory:<9} {:>6} {:>7} {:>15} {:>15} {:>15} {:>15} {:>12.0} {:>8.2}M",
            self.tasks,
            self.frames,
            self.contact,
            self.unwind,
            self.list,
            self.stacks,
            self.stacks.seconds() * 1e9 / count(self.tasks),
            count(self.frames) / self.stacks.wall.as_secs_f64() / 1e6,
        );
    }
}

/// Converts a count for calculations.
pub fn count(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

fn frames(all: &[(Task, Stack)]) -> usize {
    all.iter().map(|(_, stack)| stack.frames.len()).sum()
}

/// Times several runs. Dropping what a run returns is not included.
fn time<T>(mut run: impl FnMut() -> Result<T>) -> Result<Timing> {
    let mut walls = Vec::with_capacity(RUNS);
    let mut cpus = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let (start, used) = (Instant::now(), cpu::used());
        let done = run()?;
        cpus.push(cpu::used() - used);
        walls.push(start.elapsed());
        drop(done);
    }
    walls.sort_unstable();
    cpus.sort_unstable();
    Ok(Timing {
        wall: walls[RUNS / 2],
        cpu: cpus[RUNS / 2],
    })
}

/// How much memory all of it takes on a core file, in MiB: measured in a process of its own.
///
/// # Errors
/// When that process fails.
pub fn peak_memory(core: &Core) -> Result<f64> {
    let output = Command::new(env::current_exe()?)
        .arg(PEAK)
        .arg(&core.path)
        .output()?;
    ensure!(output.status.success(), "measuring memory: {output:?}");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.trim().parse::<f64>()? / 1024.0)
}

/// In that process: prints by how many KiB its memory grew at most, with everything kept until the
/// end. A core file is read and not mapped, so none of this is the guest's.
///
/// # Errors
/// When the core file or `/proc` cannot be read.
pub fn measure_peak_memory(core: &Path) -> Result<()> {
    let core = CoreFile::open(core)?;
    fs::write("/proc/self/clear_refs", "5").context("cannot reset VmHWM")?;
    let before = status("VmRSS:")?;
    let kernel = subject::first_contact(&core, core.vcpus())?;
    let unwinder = subject::unwind_data(&kernel, &core)?;
    let all = subject::stacks(&kernel, &unwinder, &core, core.vcpus())?;
    let after = status("VmHWM:")?;
    ensure!(!all.is_empty(), "no tasks");
    println!("{}", after.saturating_sub(before));
    Ok(())
}

/// A line of `/proc/self/status`, in KiB.
fn status(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.split_whitespace().next());
    value
        .with_context(|| format!("no {name} in /proc/self/status"))?
        .parse()
        .with_context(|| name.to_owned())
}
