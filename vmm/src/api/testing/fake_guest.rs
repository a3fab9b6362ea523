//! A guest that exists only in this process: [`Control`] with fixed answers and a scripted
//! transition.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use introspect::TaskKind;
use patcher::{
    AllocationReport, CheckReport, FoundFunction, FoundSymbol, FunctionReport, Mode, PatchPhase,
    PatchStatus, PauseLength, PauseReport, SwitchedBy, TaskReport,
};

use crate::api::control::Control;
use crate::api::problem::{Kind, Problem};
use crate::api::types;

/// A module that the fake guest accepts; its patch is named `fix`.
pub const ELF: &[u8] = b"\x7fELF fix";

/// Polls after which a transition completes; tasks switch at the first.
const POLLS: u32 = 3;

/// A guest of two tasks: `init` (pid 1), which switches at the first poll of every transition,
/// and `stuck` (pid 77), which blocks patches whose names begin with `stuck` until it is signalled
/// or forced, or the patch is reverted. Each change is logged.
#[derive(Debug, Default)]
pub struct FakeGuest {
    log: Arc<Mutex<Vec<String>>>,
    /// How long reading the task list takes.
    slowness: Duration,
    paused: bool,
    patches: Vec<PatchStatus>,
    polls: u32,
    /// No task ever switches.
    stuck: bool,
    /// The VM refuses to stop.
    unstoppable: bool,
    /// Its kernel has panicked with a lock held.
    dead: bool,
    /// Tasks besides the two, which switch and block as `stuck` does.
    sleepers: u16,
}

/// A module whose patch has this name.
#[must_use]
pub fn module(name: &str) -> Vec<u8> {
    format!("\x7fELF {name}").into_bytes()
}

impl FakeGuest {
    /// A guest in which no task ever switches.
    #[must_use]
    pub fn stuck() -> FakeGuest {
        FakeGuest {
            stuck: true,
            ..FakeGuest::default()
        }
    }

    /// A guest whose kernel has panicked with a lock held.
    #[must_use]
    pub fn dead() -> FakeGuest {
        FakeGuest {
            dead: true,
            ..FakeGuest::default()
        }
    }

    /// A guest whose task list takes so long to read.
    #[must_use]
    pub fn slow(slowness: Duration) -> FakeGuest {
        FakeGuest {
            slowness,
            ..FakeGuest::default()
        }
    }

    /// A guest whose VM refuses to stop.
    #[must_use]
    pub fn unstoppable() -> FakeGuest {
        FakeGuest {
            unstoppable: true,
            ..FakeGuest::default()
        }
    }

    /// A guest with so many more tasks.
    #[must_use]
    pub fn with_sleepers(sleepers: u16) -> FakeGuest {
        FakeGuest {
            sleepers,
            ..FakeGuest::default()
        }
    }

    /// The log of changes, shared with the guest.
    #[must_use]
    pub fn log(&self) -> Arc<Mutex<Vec<String>>> {
        Arc::clone(&self.log)
    }

    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    /// The reports of all tasks, none of which has switched.
    fn reports(&self) -> Vec<TaskReport> {
        let sleepers = (0..self.sleepers).map(|n| report(1000 + i32::from(n), "sleeper"));
        let named = [report(1, "init"), report(77, "stuck")];
        named.into_iter().chain(sleepers).collect()
    }

    fn with_warning(&self, task: types::Task) -> types::Task {
        let warning = self.dead.then(|| "tasklist_lock is\nheld".to_owned());
        types::Task { warning, ..task }
    }

    /// The patch `name`, which must be in transition.
    fn in_transition(&mut self, name: &str) -> Result<&mut PatchStatus, Problem> {
        let mut patches = self.patches.iter_mut();
        let patch = patches.find(|patch| patch.name == name && patch.transition);
        patch.ok_or_else(|| {
            let error = format!("patch {name} is not in transition");
            Problem::new(Kind::Conflict, error, "see GET /patches")
        })
    }
}

/// The name of the patch in a module.
fn patch_name(module: &[u8]) -> Result<String, Problem> {
    let Some(name) = module.strip_prefix(b"\x7fELF") else {
        // Of two lines: a problem has one.
        let error = "this is not an\nELF file";
        return Err(Problem::new(Kind::BadModule, error, "build one"));
    };
    let name = String::from_utf8_lossy(name).trim().to_owned();
    Ok(if name.is_empty() { "fix".into() } else { name })
}

fn task(pid: i32, comm: &str) -> types::Task {
    types::Task {
        pid,
        tgid: 1,
        state: 'S',
        kind: TaskKind::User,
        vcpu: (pid == 1).then_some(0),
        cpu: Some(0),
        patch_state: Some(-1),
        comm: comm.into(),
        warning: None,
    }
}

/// A task that has not switched.
fn report(pid: i32, comm: &str) -> TaskReport {
    TaskReport {
        pid,
        comm: comm.into(),
        kind: TaskKind::User,
        state: 'S',
        switched_by: None,
        blocker: Some("in cmdline_proc_show+0x5/0x20".into()),
        since_ms: Some(0),
        signals: 0,
        after_ms: None,
    }
}

fn symbol(address: &str, letter: char, name: &str, module: Option<&str>) -> types::Symbol {
    types::Symbol {
        address: format!("0x{address}"),
        letter,
        name: name.into(),
        module: module.map(str::to_owned),
    }
}

fn two_pauses() -> PauseReport {
    PauseReport {
        count: 2,
        total_us: 300,
        longest_us: 200,
        ..PauseReport::default()
    }
}

impl Control for FakeGuest {
    fn vm(&mut self) -> types::Vm {
        types::Vm {
            state: match self.paused {
                true => types::VmState::Paused,
                false => types::VmState::Running,
            },
            cpus: 2,
            memory: 512 << 20,
            pid: 42,
            kernel: Some("6.1.0-test".into()),
            pauses: PauseReport {
                count: 3,
                total_us: 1_500_000,
                longest_us: 52,
                histogram: [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                recent: vec![PauseLength {
                    us: 52,
                    tasks: 90,
                    walked: 2,
                }],
            },
        }
    }

    fn set_state(&mut self, state: types::RequestedState) -> Result<(), Problem> {
        self.paused = state == types::RequestedState::Paused;
        self.note(format!("{state:?}"));
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Problem> {
        if self.unstoppable {
            let error = "this guest does not stop";
            return Err(Problem::new(Kind::Internal, error, "leave it"));
        }
        self.note("stop");
        Ok(())
    }

    fn tasks(&mut self) -> Result<Vec<types::Task>, Problem> {
        std::thread::sleep(self.slowness);
        self.note("tasks");
        let tasks = [task(1, "init"), task(77, "evil\x1b[2J")];
        Ok(tasks.map(|task| self.with_warning(task)).into())
    }

    fn stack(&mut self, pid: i32) -> Result<types::TaskStack, Problem> {
        if pid != 1 {
            let error = format!("no task with pid {pid}");
            return Err(Problem::new(Kind::NotFound, error, "see GET /tasks"));
        }
        let frame = |symbol: &str, scheduler| types::StackFrame {
            ip: "0xffffffff81000000".into(),
            symbol: symbol.into(),
            scheduler,
        };
        Ok(types::TaskStack {
            task: self.with_warning(task(1, "init")),
            reliable: true,
            reason: None,
            frames: vec![
                frame("schedule+0x5e/0xb0", true),
                frame("do_wait+0x5a/0x120", false),
            ],
        })
    }

    fn stacks(&mut self) -> Result<Vec<types::TaskStack>, Problem> {
        let unreliable = types::TaskStack {
            task: self.with_warning(task(77, "evil\x1b[2J")),
            reliable: false,
            reason: Some("no rule for this code".into()),
            frames: vec![],
        };
        Ok(vec![self.stack(1)?, unreliable])
    }

    fn symbols(&mut self) -> Result<Vec<types::Symbol>, Problem> {
        Ok(vec![
            symbol("ffffffff81000000", 'T', "_text", None),
            symbol("ffffffffc0000000", 't', "init", Some("dummy")),
        ])
    }

    fn dump(&mut self, path: &Path) -> Result<types::Dump, Problem> {
        self.note(format!("dump {}", path.display()));
        Ok(types::Dump {
            path: path.display().to_string(),
            bytes: 3 << 20,
            paused_us: 1500,
        })
    }

    fn patches(&mut self) -> Vec<PatchStatus> {
        self.patches.clone()
    }

    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem> {
        self.note(format!("check {}", module.len()));
        let name = patch_name(module)?;
        let mut tasks = self.reports();
        for task in &mut tasks {
            task.since_ms = None;
        }
        // The task that would switch comes after those that block.
        let mut init = tasks.remove(0);
        (init.switched_by, init.blocker) = (Some(SwitchedBy::Stack), None);
        tasks.push(init);
        Ok(CheckReport {
            name,
            functions: vec![FoundFunction {
                object: "vmlinux".into(),
                name: "cmdline_proc_show".into(),
                sympos: 0,
                address: "0xffffffff81000100".into(),
                size: 42,
            }],
            symbols: vec![FoundSymbol {
                name: "seq_printf".into(),
                address: "0xffffffff81000200".into(),
            }],
            code: AllocationReport {
                address: "0xfffffffff2000000".into(),
                bytes: 96,
            },
            rodata: AllocationReport {
                address: "0xfffffffff2200000".into(),
                bytes: 16,
            },
            data: AllocationReport {
                address: "0xfffffffff2400000".into(),
                bytes: 1280,
            },
            tasks,
            at_once: false,
            pauses: PauseReport {
                count: 1,
                total_us: 200,
                longest_us: 200,
                ..PauseReport::default()
            },
        })
    }

    fn apply(&mut self, module: &[u8], mode: Mode) -> Result<String, Problem> {
        self.note(format!("apply {} {mode:?}", module.len()));
        let name = patch_name(module)?;
        if mode == Mode::StopMachine && name.starts_with("stuck") {
            let error = "cannot switch all tasks in one pause: 77 stuck in do_wait+0x5";
            return Err(Problem::new(Kind::Conflict, error, "see GET /patches"));
        }
        self.polls = 0;
        self.patches.push(PatchStatus {
            name: name.clone(),
            phase: PatchPhase::Applying,
            enabled: true,
            transition: true,
            force: false,
            replace: false,
            signal: false,
            kept_bytes: 0,
            functions: vec![FunctionReport {
                object: "vmlinux".into(),
                name: "cmdline_proc_show".into(),
                sympos: 0,
                patched: true,
            }],
            tasks: self.reports(),
            transition_ms: 0,
            pauses: two_pauses(),
        });
        Ok(name)
    }

    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem> {
        self.note(format!("revert {name} {mode:?}"));
        self.polls = 0;
        let tasks = self.reports();
        for patch in self.patches.iter_mut().filter(|p| p.name == name) {
            patch.phase = PatchPhase::Reverting;
            (patch.enabled, patch.transition) = (false, true);
            patch.tasks = tasks.clone();
        }
        Ok(())
    }

    fn cancel(&mut self, name: &str) -> Result<(), Problem> {
        self.note(format!("cancel {name}"));
        self.polls = 0;
        let patch = self.in_transition(name)?;
        patch.enabled = !patch.enabled;
        patch.phase = match patch.enabled {
            true => PatchPhase::Applying,
            false => PatchPhase::Reverting,
        };
        Ok(())
    }

    fn force(&mut self, name: &str) -> Result<(), Problem> {
        self.note(format!("force {name}"));
        self.polls = 0;
        self.in_transition(name)?.force = true;
        Ok(())
    }

    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem> {
        self.note(format!("signal {name} after {after:?}"));
        self.in_transition(name)?.signal = after.is_zero();
        Ok(())
    }

    fn poll(&mut self) {
        if self.stuck {
            return;
        }
        let Some(patch) = self.patches.iter_mut().find(|p| p.transition) else {
            return;
        };
        self.polls += 1;
        let blocked = patch.name.starts_with("stuck")
            && patch.phase == PatchPhase::Applying
            && !patch.signal
            && !patch.force;
        let pending = |task: &&mut TaskReport| task.switched_by.is_none();
        for task in patch.tasks.iter_mut().filter(pending) {
            if blocked && task.pid != 1 {
                continue;
            }
            task.switched_by = Some(SwitchedBy::Stack);
            task.blocker = None;
            task.since_ms = None;
            task.after_ms = Some(u64::from(self.polls));
        }
        if blocked || self.polls < POLLS {
            return;
        }
        patch.transition = false;
        patch.transition_ms = 60;
        patch.phase = match patch.phase {
            PatchPhase::Applying => PatchPhase::Applied,
            _ => PatchPhase::Reverted,
        };
    }

    fn due(&mut self) -> Option<Instant> {
        let runs = self.patches.iter().any(|p| p.transition);
        runs.then(|| Instant::now() + Duration::from_millis(5))
    }
}
