//! How fast a guest's kernel, tasks and stacks are read, on core files of a stock kernel with 10 to
//! 20,000 sleeping processes.
//!
//! `cargo bench -p tests` makes the core files that are not in the cache (in the test bed), lets
//! Criterion measure CPU time, then prints a table over all sizes that also has the elapsed time,
//! the memory that is used and, where drgn is installed, how many times as fast introspect is.

mod cpu;
mod drgn;
mod report;
mod subject;

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use tests::sleeper_cores::{self, Core, SIZES};

use crate::cpu::CpuTime;
use crate::report::Figures;
use crate::subject::Subject;

/// The number of sleepers that the goals are for.
const MAIN: u32 = 5_000;
/// The group that shows the cost over the number of tasks.
const ALL_STACKS: &str = "all stacks";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    let done = match words.as_slice() {
        [_, flag, plan] if flag == sleeper_cores::INSIDE => sleeper_cores::inside(Path::new(plan)),
        [_, flag, core] if flag == report::PEAK => report::measure_peak_memory(Path::new(core)),
        _ => bench(&words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("introspect: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(words: &[String]) -> Result<()> {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .with_measurement(CpuTime)
        .configure_from_args();
    let (release, cores) = sleeper_cores::all()?;
    // One group for all sizes, so that Criterion draws a line through them.
    let mut group = criterion.benchmark_group(ALL_STACKS);
    for core in &cores {
        all_stacks(&mut group, &Subject::load(core)?)?;
    }
    group.finish();
    for core in cores.iter().filter(|core| core.sleepers == MAIN) {
        steps(&mut criterion, &Subject::load(core)?)?;
    }
    criterion.final_summary();
    // Without it Criterion only tries each benchmark, or lists them.
    if words.iter().any(|word| word == "--bench") && !words.iter().any(|word| word == "--list") {
        summary(&release, &cores)?;
    }
    Ok(())
}

/// Measures reading all stacks.
fn all_stacks(group: &mut BenchmarkGroup<'_, CpuTime>, subject: &Subject) -> Result<()> {
    let vcpus = subject.vcpus();
    for (name, memory) in subject.memories() {
        let kernel = subject::first_contact(memory, vcpus)?;
        let unwinder = subject::unwind_data(&kernel, memory)?;
        let all = subject::stacks(&kernel, &unwinder, memory, vcpus)?;
        subject::check(&all, subject.sleepers).with_context(|| name.to_owned())?;
        subject::check_each(&kernel, &unwinder, memory, (vcpus, &all)).context(name)?;
        let tasks = all.len() as u64;
        group.throughput(Throughput::Elements(tasks));
        group.bench_function(BenchmarkId::new(name, tasks), |bencher| {
            bencher.iter_with_large_drop(|| subject::stacks(&kernel, &unwinder, memory, vcpus));
        });
    }
    Ok(())
}

/// Measures each step separately.
fn steps(criterion: &mut Criterion<CpuTime>, subject: &Subject) -> Result<()> {
    let vcpus = subject.vcpus();
    for (name, memory) in subject.memories() {
        let kernel = subject::first_contact(memory, vcpus)?;
        let mut group = criterion.benchmark_group(format!("{MAIN} sleepers, {name}"));
        group.bench_function("first contact", |bencher| {
            bencher.iter_with_large_drop(|| subject::first_contact(memory, vcpus));
        });
        group.bench_function("unwind data", |bencher| {
            bencher.iter_with_large_drop(|| subject::unwind_data(&kernel, memory));
        });
        group.bench_function("tasks", |bencher| {
            bencher.iter_with_large_drop(|| subject::list(&kernel, memory, vcpus));
        });
        group.finish();
    }
    Ok(())
}

fn summary(release: &str, cores: &[Core]) -> Result<()> {
    Figures::print_header();
    let mut main = None;
    for core in cores {
        let subject = Subject::load(core)?;
        for (name, memory) in subject.memories() {
            let figures = Figures::of(&subject, memory)?;
            figures.print(core.sleepers, name);
            if core.sleepers == MAIN {
                main = Some((core, figures));
            }
        }
    }
    let (core, figures) = main.with_context(|| format!("{MAIN} is not among {SIZES:?}"))?;
    println!(
        "\ngoals, for {MAIN} sleepers: first contact 50 ms, all stacks 20 ms and 2M frames/s, \
         memory 64 MiB\nmemory: at most {:.1} MiB, with unwind data, symbols and types",
        report::peak_memory(core)?
    );
    drgn::compare(core, release, &figures)?;
    println!("\nplot of the cost over tasks: target/criterion/{ALL_STACKS}/report/lines.svg");
    Ok(())
}
