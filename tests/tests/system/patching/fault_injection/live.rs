//! The same in a running guest under load: every step that changes it fails in turn, under a real
//! KVM, and the guest runs on.
//!
//! This program is its VMM: `outpatch run` with a second patcher besides that of the control
//! socket, on a machine that fails at the requested step. The guest changes its own memory
//! meanwhile, so not all of it can be compared with what it was: its code can.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use anyhow::{Context, Result, bail, ensure};
use guests::drive::MEMORY_MIB;
use introspect::{Gva, Kernel};
use patcher::{Machine, Patcher};
use tests::fault_machine::FaultMachine;
use vmm::api::{ControlSocket, Controller, Limits, Server};
use vmm::{VmConfig, VmHandle, VmMachine, VmState};

use super::sequences::{self, FaultyGuest, Place, Sequence, expect_reported};
use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;
use crate::patching::soak;

/// The first argument with which this program is started as a VMM.
pub const RUN: &str = "run";

/// How many bytes of code are read at a time.
const CHUNK: usize = 64 << 10;
/// How long the guest's kernel may take to be found.
const FOUND_WITHIN: Duration = Duration::from_secs(60);
/// How long the guest's clock may take to tick.
const TICKS_WITHIN: Duration = Duration::from_secs(10);
/// How often a sequence is run without a fault. The median number of steps counts, as one run may
/// take long.
const FAULTLESS_RUNS: usize = 5;
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(3000);

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

/// In the bed: boots a guest with a load that checks its results, under this program as the VMM,
/// and waits until that has tried every sequence.
fn faults(fixture: &Fixture, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let vmm = env::current_exe()?;
    let guest = fixture.boot_under(&vmm, generation, (2, MEMORY_MIB), String::new())?;
    fixture.with(guest, |guest| {
        let log = guest.dmesg()?;
        guest.sh("churn /tmp/churn & hammer 2 /tmp/hammer & sleeper 10 & sleep 2")?;
        let (modules, result) = (modules_file(guest.socket()), result_file(guest.socket()));
        let files = sequences::all(Place::LiveGuest).map(|sequence| kernel.patch(sequence.file));
        let files = files.collect::<Result<Vec<_>>>()?;
        write_whole(&modules, &files.join("\n"))?;
        let deadline = Instant::now() + LIMIT;
        while !result.exists() {
            ensure!(Instant::now() < deadline, "no result within {LIMIT:?}");
            thread::sleep(Duration::from_millis(100));
        }
        let text = fs::read_to_string(&result)?;
        ensure!(!text.contains(FAILED), "{text}");
        print!("{generation}, live:\n{text}");
        soak::expect_right_results(guest)?;
        guest.expect_unharmed(&log)
    })
}

/// How the result of a run that failed begins.
const FAILED: &str = "FAILED: ";

/// The file beside the guest's socket that starts the run: the modules' files, one on each line.
fn modules_file(socket: &Path) -> PathBuf {
    socket.with_extension("modules")
}

/// The file beside the guest's socket with the result.
fn result_file(socket: &Path) -> PathBuf {
    socket.with_extension("result")
}

/// Creates a file that is there either completely or not at all.
fn write_whole(file: &Path, text: &str) -> Result<()> {
    let part = file.with_extension("part");
    fs::write(&part, text)?;
    Ok(fs::rename(part, file)?)
}

/// This program as a VMM, with the options of `outpatch run`.
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
    vmm::run_vm(&config, |vm| {
        let server = Server::start(socket, Controller::new(vm.clone()), Limits::default())?;
        let vm = vm.clone();
        // The thread ends with the process, if not before.
        thread::Builder::new().spawn(move || {
            let result = try_all(&vm, &path);
            let text = result.unwrap_or_else(|error| format!("{FAILED}{error:#}"));
            if let Err(error) = write_whole(&result_file(&path), &text) {
                eprintln!("cannot write the result: {error:#}");
            }
        })?;
        Ok::<_, io::Error>(server)
    })?;
    Ok(())
}

/// Waits for the modules, and tries every sequence. Returns a line on each.
fn try_all(vm: &VmHandle, socket: &Path) -> Result<String> {
    let modules = modules_file(socket);
    while !modules.exists() {
        thread::sleep(Duration::from_millis(100));
    }
    let files = fs::read_to_string(modules)?;
    let mut guest = LiveGuest::find(vm)?;
    let mut text = String::new();
    for (sequence, file) in sequences::all(Place::LiveGuest).zip(files.lines()) {
        let Sequence { name, calls, .. } = sequence;
        let started = Instant::now();
        let tried = guest.every_step(sequence, &fs::read(file)?);
        let (tried, steps) = tried.with_context(|| format!("{name}: {calls:?}"))?;
        let seconds = started.elapsed().as_secs();
        text += &format!(
            "{name}: {tried} of {steps} steps failed, each once, {calls:?}, in {seconds} s\n"
        );
    }
    Ok(text)
}

/// The running guest.
struct LiveGuest<'v> {
    vm: &'v VmHandle,
    machine: FaultMachine<VmMachine>,
    patcher: Patcher,
    /// The kernel's code before the call that is made.
    before: Vec<u8>,
}

impl<'v> LiveGuest<'v> {
    /// Waits until the guest's kernel is found.
    fn find(vm: &'v VmHandle) -> Result<LiveGuest<'v>> {
        let mut guest = LiveGuest {
            vm,
            machine: FaultMachine::new(vm.machine()),
            patcher: Patcher::new(),
            before: Vec::new(),
        };
        let deadline = Instant::now() + FOUND_WITHIN;
        while let Err(error) = guest.patcher.kernel(&mut guest.machine) {
            ensure!(Instant::now() < deadline, "{error}");
        }
        Ok(guest)
    }

    /// Runs the sequence once for each step that it has without a fault. Returns how many of them
    /// failed, and how many there are. Not every run reaches all of them: the guest is never the
    /// same twice.
    fn every_step(&mut self, sequence: &Sequence, module: &[u8]) -> Result<(u64, u64)> {
        let mut counts = [0; FAULTLESS_RUNS];
        for steps in &mut counts {
            self.machine.fail_at(None);
            let failed = sequences::run(self, sequence, module).context("with no fault")?;
            ensure!(failed == 0, "{failed} calls failed by themselves");
            *steps = self.machine.steps();
        }
        // The first run has more steps: the code that wakes sleepers stays in the guest afterwards.
        counts.sort_unstable();
        let steps = counts[FAULTLESS_RUNS / 2];
        let code = self.copy_code(Vec::new())?;
        let mut tried = 0;
        for step in 0..steps {
            let place = || format!("step {step} of {steps}");
            self.machine.fail_at(Some(step));
            let failed = sequences::run(self, sequence, module).with_context(place)?;
            self.expect_code(&code).with_context(place)?;
            match self.machine.failed() {
                Some(call) => expect_reported(failed, call).with_context(place)?,
                None => ensure!(failed == 0, "{failed} calls failed by themselves"),
            }
            tried += u64::from(self.machine.failed().is_some());
        }
        ensure!(tried > steps / 2, "{tried} of {steps} steps were reached");
        Ok((tried, steps))
    }

    /// Calls `chunk` with the kernel's own code, without that of modules, chunk by chunk, and the
    /// offset of each.
    fn code(&mut self, mut chunk: impl FnMut(usize, &[u8])) -> Result<()> {
        let kernel = self.patcher.kernel(&mut self.machine)?;
        let (start, end) = (address(kernel, "_stext")?, address(kernel, "_etext")?);
        let memory = kernel.memory(self.machine.memory());
        let len = usize::try_from(end.since(start))?;
        let mut bytes = vec![0; CHUNK];
        for at in (0..len).step_by(CHUNK) {
            let bytes = &mut bytes[..CHUNK.min(len - at)];
            memory.read(start.add(at as u64), bytes)?;
            chunk(at, bytes);
        }
        Ok(())
    }

    /// Copies the code as it is now, into memory that was used before: under emulation, new memory
    /// takes most of the time.
    fn copy_code(&mut self, mut copy: Vec<u8>) -> Result<Vec<u8>> {
        copy.clear();
        self.code(|_, bytes| copy.extend_from_slice(bytes))?;
        Ok(copy)
    }

    /// Checks that the code is what it was.
    fn expect_code(&mut self, before: &[u8]) -> Result<()> {
        let mut first = None;
        self.code(|at, bytes| {
            let was = before.get(at..at + bytes.len()).unwrap_or_default();
            if first.is_none() && was != bytes {
                let same = was.iter().zip(bytes).take_while(|(a, b)| a == b);
                first = Some(at + same.count());
            }
        })?;
        match first {
            Some(at) => bail!("the code is different from _stext+{at:#x} on"),
            None => Ok(()),
        }
    }
}

impl FaultyGuest for LiveGuest<'_> {
    type Machine = VmMachine;

    fn parts(&mut self) -> (&mut FaultMachine<VmMachine>, &mut Patcher) {
        (&mut self.machine, &mut self.patcher)
    }

    fn wait(&self, delay: Duration) {
        thread::sleep(delay);
    }

    fn take_snapshot(&mut self) -> Result<()> {
        let before = std::mem::take(&mut self.before);
        self.before = self.copy_code(before)?;
        Ok(())
    }

    fn expect_unchanged(&mut self) -> Result<()> {
        let before = std::mem::take(&mut self.before);
        let unchanged = self.expect_code(&before);
        self.before = before;
        unchanged
    }

    /// Checks that the guest's clock ticks.
    fn expect_running(&mut self) -> Result<()> {
        ensure!(self.vm.state() == VmState::Running, "the guest is paused");
        let kernel = self.patcher.kernel(&mut self.machine)?;
        let ticks = address(kernel, "jiffies_64")?;
        let memory = kernel.memory(self.machine.memory());
        let (first, deadline) = (memory.u64(ticks)?, Instant::now() + TICKS_WITHIN);
        while memory.u64(ticks)? == first {
            ensure!(Instant::now() < deadline, "the guest's clock does not tick");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

fn address(kernel: &Kernel, symbol: &str) -> Result<Gva> {
    Ok(kernel.symbols.address(symbol)?)
}
