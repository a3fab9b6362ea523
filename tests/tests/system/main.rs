//! Stock kernels booted, patched and checked under a real KVM: the host's own where it serves, else the nested test bed.
//!
//! Each scenario runs in a bed of its own, in a process of its own: this binary, started again inside. A guest that is lost
//! before outpatch first touched it is the bed's loss: it is printed, counted, and the boot tried once more. A guest lost later
//! fails its scenario. A bed that is lost, all guests in it with it, is treated alike: said, counted, and tried once more.

mod harness;
mod introspection;
mod patching;
mod vmm;

use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use guests::bed::{self, Bed, BedError};
use guests::kernel::Generation;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::harness::fixture::{Assets, Fixture, Scratch, Tally};
use crate::harness::{kept_cores, shared_guest};
use crate::introspection::{differential, flavours, symbols};
use crate::patching::{
    apply_revert, fault_injection, guest_tools, insmod, no_livepatch, refusals, soak, task_kinds,
    versus_klp,
};
use crate::vmm::machine;

/// How long most scenarios may take.
const SCENARIO_LIMIT: Duration = Duration::from_secs(600);

/// Beds at once at the most: each takes 4 GiB of memory.
const MOST_BEDS: usize = 4;

/// What a scenario does, given its fixture.
type Body = Box<dyn Fn(&Fixture) -> Result<()> + Send + Sync>;

/// What the host does with the scratch folder of a scenario.
type After = Box<dyn Fn(&Assets, &Path) -> Result<()> + Send + Sync>;

/// A named scenario, run inside the bed.
struct Scenario {
    name: String,
    run: Body,
    limit: Duration,
    /// The generation whose cores the host compares while the scenario runs.
    judged: Option<Generation>,
    /// What the host does behind it, with what it left in the scratch folder.
    then: Option<After>,
    /// One more of a kind of which a plain run has others: it runs when all are asked for.
    more: bool,
}

impl Scenario {
    fn new(
        name: impl Into<String>,
        run: impl Fn(&Fixture) -> Result<()> + Send + Sync + 'static,
    ) -> Scenario {
        Scenario {
            name: name.into(),
            run: Box::new(run),
            limit: SCENARIO_LIMIT,
            judged: None,
            then: None,
            more: false,
        }
    }

    /// Lets it take longer, or not so long.
    fn limit(self, limit: Duration) -> Scenario {
        Scenario { limit, ..self }
    }

    /// Leaves it to runs of all scenarios, if `more`.
    fn more(self, more: bool) -> Scenario {
        Scenario { more, ..self }
    }

    /// Goes on outside of the bed, where nothing is emulated.
    fn then(self, then: impl Fn(&Assets, &Path) -> Result<()> + Send + Sync + 'static) -> Scenario {
        let then: Option<After> = Some(Box::new(then));
        Scenario { then, ..self }
    }

    /// Has the core files that it hands over compared on the host: see [`differential`].
    fn judged(self, generation: Generation) -> Scenario {
        let judged = Some(generation);
        Scenario { judged, ..self }
    }
}

fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(machine::scenarios());
    all.extend(symbols::scenarios());
    all.extend(flavours::scenarios());
    all.extend(refusals::scenarios());
    all.extend(shared_guest::scenarios());
    all.extend(insmod::scenarios());
    all.extend(no_livepatch::scenarios());
    all.extend(versus_klp::scenarios());
    all.extend(fault_injection::scenarios());
    all.extend(task_kinds::scenarios());
    all.extend(soak::scenarios());
    all.extend(guest_tools::scenarios());
    all.extend(apply_revert::scenarios());
    all.extend(differential::scenarios());
    all
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    if let [_, flag, name, spec] = words.as_slice()
        && flag == "--inside"
    {
        return inside(name, spec);
    }
    if let [_, run, options @ ..] = words.as_slice()
        && run == "run"
    {
        return fault_injection::live::run(options);
    }
    outside()
}

/// On the host: one trial a scenario, and the count of guests at the end.
fn outside() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A nested bed keeps one core busy; the time limits inside allow no more than one for each.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert(cores.min(MOST_BEDS));
    let tally = Arc::new(Tally::default());
    let trials = scenarios()
        .into_iter()
        .filter(is_wanted)
        .map(|scenario| {
            let tally = Arc::clone(&tally);
            Trial::test(scenario.name.clone(), move || {
                let begun = Instant::now();
                let ran = run_in_bed(&scenario, &tally);
                println!("{} took {} s", scenario.name, begun.elapsed().as_secs());
                ran.map_err(|error| Failed::from(format!("{error:#}")))
            })
        })
        .collect();
    let listing = arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !listing {
        println!(
            "guest boots: {}, of them lost: {}; nested beds: {}, of them lost: {}",
            tally.boots(),
            tally.lost(),
            bed::counts().started,
            bed::counts().lost
        );
    }
    conclusion.exit_code()
}

/// Asks for all scenarios.
const ALL: &str = "OUTPATCH_TEST_ALL";

fn is_wanted(scenario: &Scenario) -> bool {
    (!scenario.more || env::var_os(ALL).is_some())
        && flavours::is_wanted(scenario)
        && no_livepatch::is_wanted(scenario)
}

/// A bed that dies says nothing about the scenario in it: that is told and counted, and the scenario gets another bed, once.
fn run_in_bed(scenario: &Scenario, tally: &Tally) -> Result<()> {
    match run_in_one_bed(scenario, tally) {
        Err(error) if is_beds_death(&error) => {
            println!("LOST the bed of {}, once more: {error:#}", scenario.name);
            run_in_one_bed(scenario, tally)
        }
        done => done,
    }
}

fn is_beds_death(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<BedError>(),
        Some(BedError::Died { .. })
    )
}

fn run_in_one_bed(scenario: &Scenario, tally: &Tally) -> Result<()> {
    let mut assets = Assets::prepare()?.clone();
    let scratch = Scratch::new()?;
    let Some(generation) = scenario.judged else {
        in_bed(scenario, &assets, &scratch, tally)?;
        let then = scenario.then.as_ref();
        return then.map_or(Ok(()), |then| then(&assets, scratch.path()));
    };
    let (name, stock, vmlinux) = differential::prepare(generation)?;
    assets.stock.insert(name, stock);
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let folder = scratch.path();
        let judge = || differential::judged(generation, &vmlinux, folder, &ended);
        let judge = scope.spawn(judge);
        let ran = in_bed(scenario, &assets, &scratch, tally);
        ended.store(true, Ordering::Release);
        let judged = judge.join().map_err(|_| anyhow!("the judge panicked"))?;
        match ran {
            Err(error) if is_beds_death(&error) => Err(error),
            // When the judge gives up, the scenario does too: its word first.
            Err(error) => match judged {
                Err(judged) => Err(anyhow!("{judged:#}\n{error:#}")),
                Ok(()) => Err(error),
            },
            Ok(()) => judged,
        }
    })
}

fn in_bed(scenario: &Scenario, assets: &Assets, scratch: &Scratch, tally: &Tally) -> Result<()> {
    let spec = scratch.path().join("assets.json");
    std::fs::write(&spec, serde_json::to_vec(assets)?)?;
    let mut command = Command::new(env::current_exe()?);
    command.arg("--inside").arg(&scenario.name).arg(&spec);
    let out = Bed::new()
        .writable(scratch.path())
        .limit(scenario.limit)
        .output(&mut command, b"");
    // Count first: a scenario that failed booted its guests too.
    tally.add(scratch.path());
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

/// In the bed: one scenario.
fn inside(name: &str, spec: &str) -> ExitCode {
    let result = Fixture::load(spec.as_ref()).and_then(|fixture| {
        let scenario = scenarios()
            .into_iter()
            .find(|scenario| scenario.name == name);
        (scenario.with_context(|| format!("no scenario {name}"))?.run)(&fixture)
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
