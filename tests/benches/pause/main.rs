//! How long a guest is stopped for a patch, over the number of its tasks: with stacks walked ahead of the pause and without, in a guest
//! where nobody has run in between and in one where a tenth of the sleepers has.
//!
//! The guests are cores of a stock kernel (those of the bench `introspect`), in memory; what is not in it is what stopping and starting
//! vCPUs takes. `cargo bench -p tests --bench pause` prints a table.

use std::{env, fs, path::Path, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use guests::kernel::Flavour;
use guests::kernel::stock::{Order, PreparedKernel};
use introspect::{CoreFile, Kernel, TaskKind, task_list};
use patcher::{Machine, Mode, Patcher, PauseLength};
use tests::core_machine::CoreMachine;
use tests::sleeper_cores;
use vm_memory::{Bytes, GuestAddress};

/// Runs of which the median is told.
const RUNS: usize = 11;
/// In a busy guest one of so many sleepers has run since its stack was walked.
const RAN: usize = 10;
/// Nobody is in what the first replaces; a quarter of the sleepers, threads and children among them, is in what the second does.
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
    let stock = PreparedKernel::prepare(Order {
        generation: sleeper_cores::GENERATION,
        flavour: Flavour::Cloud,
        patches: &PATCHES.map(|(file, _)| file),
        modules: &[],
        boot: None,
    })?;
    for (file, name) in PATCHES {
        let module = fs::read(stock.patch(file)?)?;
        println!(
            "\n{name} on Linux {release}: the first pause, µs (and stacks walked in it), medians of {RUNS}"
        );
        println!(
            "{:>8} {:>18} {:>18} {:>18} {:>18}",
            "tasks", "plain", "ahead, quiet", "ahead, busy", "turning back, quiet"
        );
        let mut rows = Vec::new();
        for core in &all {
            let file = CoreFile::open(&core.path)?;
            let row = Row::measure(&file, &module, name);
            rows.push(row.with_context(|| format!("{} sleepers", core.sleepers))?);
        }
        rows.iter().for_each(Row::print);
        slope(&rows);
        // Nobody is in the first's function, so that each application ends in its first pause.
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

/// A whole application in a guest whose kernel is known and in which nobody is in the way, from the module's file to the end of the
/// transition, the walk ahead included: the median, in µs.
fn whole(machine: &mut CoreMachine, module: &[u8], name: &str) -> Result<u128> {
    machine.restore()?;
    let mut patcher = Patcher::new();
    let mut took = Vec::new();
    // The first finds the kernel.
    for _ in 0..=RUNS {
        let asked = Instant::now();
        patcher.apply(machine, module, Mode::PerTask)?;
        took.push(asked.elapsed().as_micros());
        ensure!(
            patcher.status().iter().any(|patch| !patch.transition),
            "somebody is in the way"
        );
        patcher.revert(machine, name, Mode::PerTask)?;
    }
    took.remove(0);
    took.sort_unstable();
    Ok(took[RUNS / 2])
}

/// The pauses of one core.
struct Row {
    tasks: u64,
    plain: PauseLength,
    quiet: PauseLength,
    busy: PauseLength,
    back: PauseLength,
}

impl Row {
    fn measure(core: &CoreFile, module: &[u8], name: &str) -> Result<Row> {
        let mut machine = CoreMachine::load(core)?;
        let (plain, _) = median(&mut machine, module, name, Patcher::without_walking_ahead)?;
        let (quiet, back) = median(&mut machine, module, name, Patcher::new)?;
        let counters = switch_counters(&machine, core)?;
        machine.on_pause(move |memory| {
            for at in &counters {
                // A counter that cannot be read was found a moment ago: there is no such guest.
                let count: u64 = memory.read_obj(*at).unwrap_or_default();
                let _ = memory.write_obj(count + 1, *at);
            }
        });
        let (busy, _) = median(&mut machine, module, name, Patcher::new)?;
        ensure!(plain.walked >= plain.tasks / 2, "{plain:?}");
        ensure!(quiet.walked <= 8, "{quiet:?}");
        ensure!(busy.walked >= quiet.walked, "{busy:?}");
        Ok(Row {
            tasks: quiet.tasks,
            plain,
            quiet,
            busy,
            back,
        })
    }

    fn print(&self) {
        let cell = |pause: &PauseLength| format!("{} ({})", pause.us, pause.walked);
        println!(
            "{:>8} {:>18} {:>18} {:>18} {:>18}",
            self.tasks,
            cell(&self.plain),
            cell(&self.quiet),
            cell(&self.busy),
            cell(&self.back)
        );
    }
}

/// What a task more costs, from the smallest guest to the largest.
fn slope(rows: &[Row]) {
    let (Some(small), Some(large)) = (rows.first(), rows.last()) else {
        return;
    };
    let more = large.tasks.saturating_sub(small.tasks).max(1);
    let each =
        |of: fn(&Row) -> &PauseLength| of(large).us.saturating_sub(of(small).us) * 1000 / more;
    println!(
        "a task more costs: plain {} ns, ahead {} ns, in a busy guest {} ns",
        each(|row| &row.plain),
        each(|row| &row.quiet),
        each(|row| &row.busy)
    );
}

/// The first pause of an application, and the one in which it is turned back: of the runs, those of median length.
fn median(
    machine: &mut CoreMachine,
    module: &[u8],
    name: &str,
    new: fn() -> Patcher,
) -> Result<(PauseLength, PauseLength)> {
    let mut applied = Vec::new();
    let mut back = Vec::new();
    for _ in 0..RUNS {
        machine.restore()?;
        let mut patcher = new();
        patcher.apply(machine, module, Mode::PerTask)?;
        applied.push(last(&patcher)?);
        patcher.revert(machine, name, Mode::PerTask)?;
        back.push(last(&patcher)?);
    }
    let middle = |mut pauses: Vec<PauseLength>| {
        pauses.sort_unstable_by_key(|pause| pause.us);
        pauses[RUNS / 2]
    };
    Ok((middle(applied), middle(back)))
}

fn last(patcher: &Patcher) -> Result<PauseLength> {
    let recent = &patcher.pauses().recent;
    recent.last().copied().context("no pause")
}

/// Where the voluntary context switches of every tenth sleeper are counted.
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
