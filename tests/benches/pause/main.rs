//! How long a guest is paused for a patch, by the number of its tasks: with stacks walked before
//! the pause and without, in an idle guest and in one in which a tenth of the sleepers has run
//! since.
//!
//! The guests are core files of a stock kernel (those of the bench `introspect`), in memory, so the
//! time for stopping and starting vCPUs is not included. `cargo bench -p tests --bench pause`
//! prints a table.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use guests::kernel::Flavour;
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use introspect::{CoreFile, Kernel, TaskKind, task_list};
use patcher::{Machine, Mode, Patcher, PauseLength};
use tests::core_machine::CoreMachine;
use tests::sleeper_cores;
use vm_memory::{Bytes, GuestAddress};

/// The number of runs of which the median is reported.
const RUNS: usize = 11;
/// In a busy guest, one of this many sleepers has run since its stack was walked.
const RAN: usize = 10;
/// Files and names of the patches. No task is in the function of the first; a quarter of the
/// sleepers, with their threads and children, is in the function of the second.
const PATCHES: [(&str, &str); 2] = [("livepatch-sample", "livepatch_sample"), ("pause", "pause")];

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    let done = match words.as_slice() {
        [_, flag, plan] if flag == sleeper_cores::INSIDE => sleeper_cores::inside(Path::new(plan)),
        _ if words.iter().any(|word| word == "--bench") => bench(),
        // Without it this is `cargo test --benches`, which has nothing to check here.
        _ => Ok(()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pause: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let (release, all) = sleeper_cores::all()?;
    let stock = PreparedKernel::prepare(KernelSpec {
        generation: sleeper_cores::GENERATION,
        flavour: Flavour::Cloud,
        patches: &PATCHES.map(|(file, _)| file),
        modules: &[],
        boot: None,
    })?;
    for (file, name) in PATCHES {
        let module = fs::read(stock.patch(file)?)?;
        println!(
            "\n{name} on Linux {release}: the first pause, µs (and stacks walked in it), \
             medians of {RUNS}"
        );
        println!(
            "{:>8} {:>18} {:>18} {:>18} {:>18}",
            "tasks", "no prewalk", "prewalk, idle", "prewalk, busy", "revert, idle"
        );
        let mut rows = Vec::new();
        for core in &all {
            let file = CoreFile::open(&core.path)?;
            let row = Row::measure(&file, &module, name);
            rows.push(row.with_context(|| format!("{} sleepers", core.sleepers))?);
        }
        rows.iter().for_each(Row::print);
        slope(&rows);
        // No task is in the first patch's function, so it is applied completely in the first pause.
        if let Some((_, free)) = PATCHES.first().filter(|(_, free)| *free == name) {
            for core in &all {
                let mut machine = CoreMachine::load(&CoreFile::open(&core.path)?)?;
                let took = whole(&mut machine, &module, free)?;
                println!(
                    "{:>8} sleepers: the whole application {took} µs",
                    core.sleepers
                );
            }
        }
    }
    Ok(())
}

/// How long applying a patch that no task blocks takes in all, once the kernel is known, from the
/// module's file to the end of the transition, with the prewalk: the median, in µs.
fn whole(machine: &mut CoreMachine, module: &[u8], name: &str) -> Result<u128> {
    machine.restore()?;
    let mut patcher = Patcher::new();
    let mut took = Vec::new();
    // The first run finds the kernel.
    for _ in 0..=RUNS {
        let started = Instant::now();
        patcher.apply(machine, module, Mode::PerTask)?;
        took.push(started.elapsed().as_micros());
        ensure!(
            patcher.status().iter().any(|patch| !patch.transition),
            "a task blocks the transition"
        );
        patcher.revert(machine, name, Mode::PerTask)?;
    }
    took.remove(0);
    took.sort_unstable();
    Ok(took[RUNS / 2])
}

/// The pauses on one core file.
struct Row {
    tasks: u64,
    without_prewalk: PauseLength,
    idle: PauseLength,
    busy: PauseLength,
    reverted: PauseLength,
}

impl Row {
    fn measure(core: &CoreFile, module: &[u8], name: &str) -> Result<Row> {
        let mut machine = CoreMachine::load(core)?;
        let (without_prewalk, _) = median(&mut machine, module, name, Patcher::without_prewalk)?;
        let (idle, reverted) = median(&mut machine, module, name, Patcher::new)?;
        let counters = switch_counters(&machine, core)?;
        machine.on_pause(move |memory| {
            for at in &counters {
                // Each counter was readable when it was found.
                let count: u64 = memory.read_obj(*at).unwrap_or_default();
                let _ = memory.write_obj(count + 1, *at);
            }
        });
        let (busy, _) = median(&mut machine, module, name, Patcher::new)?;
        ensure!(
            without_prewalk.walked >= without_prewalk.tasks / 2,
            "{without_prewalk:?}"
        );
        ensure!(idle.walked <= 8, "{idle:?}");
        ensure!(busy.walked >= idle.walked, "{busy:?}");
        Ok(Row {
            tasks: idle.tasks,
            without_prewalk,
            idle,
            busy,
            reverted,
        })
    }

    fn print(&self) {
        let cell = |pause: &PauseLength| format!("{} ({})", pause.us, pause.walked);
        println!(
            "{:>8} {:>18} {:>18} {:>18} {:>18}",
            self.tasks,
            cell(&self.without_prewalk),
            cell(&self.idle),
            cell(&self.busy),
            cell(&self.reverted)
        );
    }
}

/// Prints what each additional task costs, from the smallest guest to the largest.
fn slope(rows: &[Row]) {
    let (Some(small), Some(large)) = (rows.first(), rows.last()) else {
        return;
    };
    let more = large.tasks.saturating_sub(small.tasks).max(1);
    let each =
        |of: fn(&Row) -> &PauseLength| of(large).us.saturating_sub(of(small).us) * 1000 / more;
    println!(
        "each additional task: {} ns without prewalk, {} ns with it, {} ns in a busy guest",
        each(|row| &row.without_prewalk),
        each(|row| &row.idle),
        each(|row| &row.busy)
    );
}

/// The first pause of applying the patch, and the first one of reverting it: those of median
/// length.
fn median(
    machine: &mut CoreMachine,
    module: &[u8],
    name: &str,
    new: fn() -> Patcher,
) -> Result<(PauseLength, PauseLength)> {
    let mut applied = Vec::new();
    let mut reverted = Vec::new();
    for _ in 0..RUNS {
        machine.restore()?;
        let mut patcher = new();
        patcher.apply(machine, module, Mode::PerTask)?;
        applied.push(last(&patcher)?);
        patcher.revert(machine, name, Mode::PerTask)?;
        reverted.push(last(&patcher)?);
    }
    let middle = |mut pauses: Vec<PauseLength>| {
        pauses.sort_unstable_by_key(|pause| pause.us);
        pauses[RUNS / 2]
    };
    Ok((middle(applied), middle(reverted)))
}

fn last(patcher: &Patcher) -> Result<PauseLength> {
    let recent = &patcher.pauses().recent;
    recent.last().copied().context("no pause")
}

/// The addresses at which the voluntary context switches of every tenth sleeper are counted.
fn switch_counters(machine: &CoreMachine, core: &CoreFile) -> Result<Vec<GuestAddress>> {
    let kernel = Kernel::find(machine.memory(), core.vcpus())?;
    let memory = kernel.memory(machine.memory());
    let sleepers = task_list::read(&kernel, &memory, core.vcpus())?
        .into_iter()
        .filter(|task| task.kind == TaskKind::User && task.vcpu.is_none() && task.exit_state == 0);
    let at = sleepers.step_by(RAN).map(|task| {
        Ok(memory
            .translate(kernel.layout.task.nvcsw.of(task.addr))?
            .gpa)
    });
    at.collect()
}
