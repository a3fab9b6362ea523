//! Runs scenarios: on the host as tests of libtest's kind, each in a test bed of its own; in the
//! bed, by name.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

use anyhow::{Context, Result, anyhow, bail};
use guests::bed::{self, Bed, BedError};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;
use crate::harness::guest_counts::GuestCounts;
use crate::harness::scenario::Scenario;
use crate::harness::scratch::Scratch;
use crate::harness::{kept_cores, registry};

/// The argument with which this program is started in the bed, before the scenario's name and the
/// file that describes the assets.
pub const INSIDE: &str = "--inside";

/// How many beds run at once at most: each takes 4 GiB of memory.
const MAX_BEDS: usize = 4;

/// On the host: runs every wanted scenario as a test, and prints the counts of guests at the end.
pub fn on_host() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A nested bed keeps one core busy; the time limits inside allow no more than one for each.
    let cores = thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert(cores.min(MAX_BEDS));
    let counts = Arc::new(GuestCounts::default());
    let trials = registry::all()
        .into_iter()
        .filter(|scenario| scenario.is_wanted)
        .map(|scenario| {
            let counts = Arc::clone(&counts);
            Trial::test(scenario.name.clone(), move || {
                let started = Instant::now();
                let result = run_with_retry(&scenario, &counts);
                println!("{} took {} s", scenario.name, started.elapsed().as_secs());
                result.map_err(|error| Failed::from(format!("{error:#}")))
            })
        })
        .collect();
    let only_lists = arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !only_lists {
        println!(
            "guest boots: {}, of them lost: {}; nested beds: {}, of them lost: {}",
            counts.boots(),
            counts.lost(),
            bed::counts().started,
            bed::counts().lost
        );
    }
    conclusion.exit_code()
}

/// A bed that dies says nothing about the scenario in it: this is reported and counted, and the
/// scenario gets another bed, once.
fn run_with_retry(scenario: &Scenario, counts: &GuestCounts) -> Result<()> {
    match run_in_new_bed(scenario, counts) {
        Err(error) if is_death_of_bed(&error) => {
            println!("LOST the bed of {}, once more: {error:#}", scenario.name);
            run_in_new_bed(scenario, counts)
        }
        result => result,
    }
}

fn is_death_of_bed(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<BedError>(),
        Some(BedError::Died { .. })
    )
}

fn run_in_new_bed(scenario: &Scenario, counts: &GuestCounts) -> Result<()> {
    let mut assets = Assets::prepare()?.clone();
    if let Some(prepare) = &scenario.prepare {
        prepare(&mut assets)?;
    }
    let scratch = Scratch::new()?;
    match &scenario.meanwhile {
        None => in_bed(scenario, &assets, &scratch, counts)?,
        Some(meanwhile) => {
            let ended = AtomicBool::new(false);
            let host = || meanwhile(&assets, scratch.path(), &ended);
            let (host, bed) = thread::scope(|scope| {
                let host = scope.spawn(host);
                let bed = in_bed(scenario, &assets, &scratch, counts);
                ended.store(true, Ordering::Release);
                let host = host.join();
                (
                    host.unwrap_or_else(|_| Err(anyhow!("the host's part panicked"))),
                    bed,
                )
            });
            both(host, bed)?;
        }
    }
    let then = scenario.then.as_ref();
    then.map_or(Ok(()), |then| then(&assets, scratch.path()))
}

/// The result of a scenario with a part in the bed and a part on the host at the same time.
fn both(host: Result<()>, bed: Result<()>) -> Result<()> {
    match (host, bed) {
        (_, Err(error)) if is_death_of_bed(&error) => Err(error),
        // When the host's part gives up, the bed's part does too: the cause comes first.
        (Err(host), Err(bed)) => Err(anyhow!("{host:#}\n{bed:#}")),
        (Ok(()), bed) => bed,
        (host, Ok(())) => host,
    }
}

fn in_bed(
    scenario: &Scenario,
    assets: &Assets,
    scratch: &Scratch,
    counts: &GuestCounts,
) -> Result<()> {
    let file = scratch.path().join("assets.json");
    fs::write(&file, serde_json::to_vec(assets)?)?;
    let mut command = Command::new(env::current_exe()?);
    command.arg(INSIDE).arg(&scenario.name).arg(&file);
    let out = Bed::new()
        .writable(scratch.path())
        .limit(scenario.limit)
        .output(&mut command, b"");
    // Count first: a scenario that failed booted its guests too.
    counts.add(scratch.path());
    let out = out.context("the test bed")?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    if !out.status.success() {
        let core = scratch.path().join(kept_cores::OF_A_FAILURE);
        if core.exists() {
            kept_cores::keep(&core)?;
        }
        bail!("{}\n{text}", out.status);
    }
    print!("{text}");
    Ok(())
}

/// In the bed: runs the scenario `name` with the assets that `file` describes.
pub fn inside(name: &str, file: &Path) -> ExitCode {
    let result = Fixture::load(file).and_then(|fixture| {
        let mut scenarios = registry::all().into_iter();
        let scenario = scenarios.find(|scenario| scenario.name == name);
        (scenario
            .with_context(|| format!("no scenario {name}"))?
            .in_bed)(&fixture)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line of causes: a backtrace through the harness says nothing.
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
