//! The same on a guest that runs and works: every step that changes it fails in turn, under a real KVM, and it goes on.
//!
//! This binary is its VMM: `outpatch run` with a second patcher beside the control socket's, on a machine that fails where it is told to.
//! What the guest does in between is its own, so that not all of its memory can be held against what it was: its code can.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::MEMORY_MIB;
use introspect::{Gva, Kernel};
use patcher::{Machine, Mode, Patcher};
use tests::fault_machine::FaultMachine;
use vmm::api::{ControlSocket, Controller, Limits, Server};
use vmm::{VmConfig, VmHandle, VmMachine, VmState};

use super::sequences::{Call, Story, Subject, somebody_was_told, tell};
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::soak;

/// Code is read in pieces of at most this.
const CHUNK: usize = 64 << 10;
/// How long the guest's kernel may take to be found, and its clock to tick.
const FOUND_WITHIN: Duration = Duration::from_secs(60);
const TICKS_WITHIN: Duration = Duration::from_secs(10);
/// A story is told so often without a fault: the middle of their steps is how many it has. One telling may go on for long.
const USUAL: usize = 5;
/// How long it all may take.
const LIMIT: Duration = Duration::from_secs(3000);

const STORIES: [Story; 3] = [
    // Everybody is in the function all the time.
    Story {
        file: "getpid",
        name: "getpid",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Finish,
            Call::Revert(Mode::PerTask),
            Call::Finish,
        ],
    },
    // One sleeps in it, and keeps the transition from its end.
    Story {
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Look,
            Call::Cancel,
            Call::Finish,
        ],
    },
    Story {
        file: "pause",
        name: "pause",
        calls: &[
            Call::Apply(Mode::PerTask),
            Call::Signal,
            Call::Finish,
            Call::Revert(Mode::PerTask),
            Call::Signal,
            Call::Finish,
        ],
    },
];

/// The first argument with which this program is started as a VMM.
pub const RUN: &str = "run";

pub fn scenarios() -> Vec<Scenario> {
    ["6.1", "6.12", "7.3"]
        .map(|generation| {
            let name = format!("fault_injection::in_a_live_guest_{generation}");
            Scenario::new(name, move |fixture| faults(fixture, generation))
                .limit(LIMIT + Duration::from_secs(120))
                .extra_if(true)
        })
        .into()
}

/// In the bed: a guest with a load that checks its answers.
fn faults(fixture: &Fixture, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let vmm = env::current_exe()?;
    let guest = fixture.boot_under(&vmm, generation, (2, MEMORY_MIB), String::new())?;
    fixture.with(guest, |guest| {
        let log = guest.dmesg()?;
        guest.sh("churn /tmp/churn & hammer 2 /tmp/hammer & sleeper 10 & sleep 2")?;
        let (order, answer) = (order(guest.socket()), answer(guest.socket()));
        let modules = STORIES.map(|story| kernel.patch(story.file).map(str::to_owned));
        let modules = modules.into_iter().collect::<Result<Vec<_>>>()?;
        put(&order, &modules.join("\n"))?;
        let until = Instant::now() + LIMIT;
        while !answer.exists() {
            ensure!(Instant::now() < until, "no answer within {LIMIT:?}");
            thread::sleep(Duration::from_millis(100));
        }
        let told = fs::read_to_string(&answer)?;
        ensure!(!told.contains(FAILED), "{told}");
        print!("{generation}, live:\n{told}");
        soak::expect_right_results(guest)?;
        guest.expect_unharmed(&log)
    })
}

/// How an answer begins that is none.
const FAILED: &str = "FAILED: ";

/// Beside the guest's socket: the modules' files, a line each.
fn order(socket: &Path) -> PathBuf {
    socket.with_extension("order")
}

/// And what came of them.
fn answer(socket: &Path) -> PathBuf {
    socket.with_extension("answer")
}

/// Makes a file that is there whole or not at all.
fn put(file: &Path, text: &str) -> Result<()> {
    let part = file.with_extension("part");
    fs::write(&part, text)?;
    Ok(fs::rename(part, file)?)
}

/// What this binary does as a VMM, with the options of `outpatch run`.
pub fn run(options: &[String]) -> ExitCode {
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &[String]) -> Result<()> {
    let pairs = options.chunks_exact(2);
    let options: BTreeMap<&str, &str> = pairs
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect();
    let option = |name| options.get(name).copied().context(name);
    let config = VmConfig {
        kernel: option("--kernel")?.into(),
        initrd: Some(option("--initrd")?.into()),
        cmdline: option("--append")?.into(),
        cpus: option("--cpus")?.parse()?,
        memory: vmm::parse_size(option("--memory")?)?,
    };
    let path = PathBuf::from(option("--socket")?);
    let socket = ControlSocket::claim(&path)?;
    vmm::run(&config, |vm| {
        let server = Server::start(socket, Controller::new(vm.clone()), Limits::default())?;
        let vm = vm.clone();
        // It ends with the process, if not before.
        thread::Builder::new().spawn(move || {
            let told = when_ordered(&vm, &path);
            let told = told.unwrap_or_else(|error| format!("{FAILED}{error:#}"));
            if let Err(error) = put(&answer(&path), &told) {
                eprintln!("no answer: {error:#}");
            }
        })?;
        Ok::<_, io::Error>(server)
    })?;
    Ok(())
}

fn when_ordered(vm: &VmHandle, socket: &Path) -> Result<String> {
    let order = order(socket);
    while !order.exists() {
        thread::sleep(Duration::from_millis(100));
    }
    let files = fs::read_to_string(order)?;
    let mut live = Live::begin(vm)?;
    let mut told = String::new();
    for (story, file) in STORIES.iter().zip(files.lines()) {
        let begun = Instant::now();
        let tried = live.every_step(story, &fs::read(file)?);
        let (tried, steps) = tried.with_context(|| format!("{}: {:?}", story.name, story.calls))?;
        told += &format!(
            "{}: {tried} of {steps} steps failed, each once, {:?}, in {} s\n",
            story.name,
            story.calls,
            begun.elapsed().as_secs()
        );
    }
    Ok(told)
}

/// The guest.
struct Live<'v> {
    vm: &'v VmHandle,
    machine: FaultMachine<VmMachine>,
    patcher: Patcher,
    /// The code before the call that is made.
    before: Vec<u8>,
}

impl<'v> Live<'v> {
    fn begin(vm: &'v VmHandle) -> Result<Live<'v>> {
        let mut live = Live {
            vm,
            machine: FaultMachine::new(vm.machine()),
            patcher: Patcher::new(),
            before: Vec::new(),
        };
        let until = Instant::now() + FOUND_WITHIN;
        while let Err(error) = live.patcher.kernel(&mut live.machine) {
            ensure!(Instant::now() < until, "{error}");
        }
        Ok(live)
    }

    /// How many steps failed, of those that there are where none does. Not every telling comes to all of them: the guest is never twice
    /// the same.
    fn every_step(&mut self, story: &Story, module: &[u8]) -> Result<(u64, u64)> {
        let mut told = [0; USUAL];
        for steps in &mut told {
            self.machine.fail_at(None);
            let failed = tell(self, story, module).context("with no fault")?;
            ensure!(failed == 0, "{failed} calls failed by themselves");
            *steps = self.machine.steps();
        }
        // The first has more: what wakes sleepers stays in the guest from then on.
        told.sort_unstable();
        let steps = told[USUAL / 2];
        let code = self.keep_code(Vec::new())?;
        let mut tried = 0;
        for step in 0..steps {
            let place = || format!("step {step} of {steps}");
            self.machine.fail_at(Some(step));
            let failed = tell(self, story, module).with_context(place)?;
            self.same_code(&code).with_context(place)?;
            match self.machine.failed() {
                Some(call) => somebody_was_told(failed, call).with_context(place)?,
                None => ensure!(failed == 0, "{failed} calls failed by themselves"),
            }
            tried += u64::from(self.machine.failed().is_some());
        }
        ensure!(tried > steps / 2, "{tried} of {steps} steps were reached");
        Ok((tried, steps))
    }

    /// Has `piece` called with each piece of the kernel's own code, modules' aside, and how far into it that is.
    fn code(&mut self, mut piece: impl FnMut(usize, &[u8])) -> Result<()> {
        let kernel = self.patcher.kernel(&mut self.machine)?;
        let (start, end) = (address(kernel, "_stext")?, address(kernel, "_etext")?);
        let memory = kernel.memory(self.machine.memory());
        let len = usize::try_from(end.since(start))?;
        let mut bytes = vec![0; CHUNK];
        for at in (0..len).step_by(CHUNK) {
            let bytes = &mut bytes[..CHUNK.min(len - at)];
            memory.read(start.add(at as u64), bytes)?;
            piece(at, bytes);
        }
        Ok(())
    }

    /// Keeps the code as it is, in memory that is used again: under emulation, new memory is what takes time.
    fn keep_code(&mut self, mut kept: Vec<u8>) -> Result<Vec<u8>> {
        kept.clear();
        self.code(|_, bytes| kept.extend_from_slice(bytes))?;
        Ok(kept)
    }

    /// Fails when the code is not what it was.
    fn same_code(&mut self, kept: &[u8]) -> Result<()> {
        let mut first = None;
        self.code(|at, bytes| {
            let was = kept.get(at..at + bytes.len()).unwrap_or_default();
            if first.is_none() && was != bytes {
                let same = was.iter().zip(bytes).take_while(|(a, b)| a == b);
                first = Some(at + same.count());
            }
        })?;
        match first {
            Some(at) => bail!("other code is left, from _stext+{at:#x} on"),
            None => Ok(()),
        }
    }
}

impl Subject for Live<'_> {
    type Machine = VmMachine;

    fn parts(&mut self) -> (&mut FaultMachine<VmMachine>, &mut Patcher) {
        (&mut self.machine, &mut self.patcher)
    }

    fn wait(&self, later: Duration) {
        thread::sleep(later);
    }

    fn note(&mut self) -> Result<()> {
        let before = std::mem::take(&mut self.before);
        self.before = self.keep_code(before)?;
        Ok(())
    }

    fn unchanged(&mut self) -> Result<()> {
        let before = std::mem::take(&mut self.before);
        let same = self.same_code(&before);
        self.before = before;
        same
    }

    /// Its clock ticks.
    fn runs(&mut self) -> Result<()> {
        ensure!(self.vm.state() == VmState::Running, "the guest stands");
        let kernel = self.patcher.kernel(&mut self.machine)?;
        let ticks = address(kernel, "jiffies_64")?;
        let memory = kernel.memory(self.machine.memory());
        let (first, until) = (memory.u64(ticks)?, Instant::now() + TICKS_WITHIN);
        while memory.u64(ticks)? == first {
            ensure!(Instant::now() < until, "the guest's clock stands");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

fn address(kernel: &Kernel, symbol: &str) -> Result<Gva> {
    Ok(kernel.symbols.address(symbol)?)
}
