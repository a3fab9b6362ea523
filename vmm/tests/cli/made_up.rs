//! The guest that is made up: what it answers to the command line's questions.

use std::path::Path;
use std::time::{Duration, Instant};

use introspect::TaskKind;
use patcher::{
    AllocationReport, CheckReport, FoundFunction, FoundSymbol, FunctionReport, Mode, PatchPhase,
    PatchStatus, PauseReport, SwitchedBy, TaskReport,
};
use vmm::api::types::{Dump, StackFrame, Symbol, Task, TaskStack, Vm, VmState};
use vmm::api::{Control, Kind, Problem};

/// A guest of two tasks. `init` switches at once; `stuck` only when a module that is called so has not been applied.
#[derive(Debug, Default)]
pub struct MadeUp {
    paused: bool,
    patches: Vec<PatchStatus>,
    polls: u32,
}

fn task(pid: i32, comm: &str) -> Task {
    Task {
        pid,
        tgid: 1,
        state: 'S',
        kind: TaskKind::User,
        vcpu: (pid == 1).then_some(0),
        cpu: Some(0),
        patch_state: Some(-1),
        comm: comm.to_owned(),
    }
}

fn symbol(address: &str, letter: char, name: &str, module: Option<&str>) -> Symbol {
    Symbol {
        address: format!("0x{address}"),
        letter,
        name: name.to_owned(),
        module: module.map(str::to_owned),
    }
}

fn report(pid: i32, comm: &str) -> TaskReport {
    TaskReport {
        pid,
        comm: comm.to_owned(),
        kind: TaskKind::User,
        state: 'S',
        switched_by: None,
        blocker: Some("cmdline_proc_show+0x5/0x20".to_owned()),
        since_ms: Some(0),
        signals: 0,
        after_ms: None,
    }
}

impl Control for MadeUp {
    fn vm(&mut self) -> Vm {
        Vm {
            state: if self.paused {
                VmState::Paused
            } else {
                VmState::Running
            },
            cpus: 2,
            memory: 512 << 20,
            pid: 4242,
            kernel: Some("6.1.0-made-up".to_owned()),
            pauses: PauseReport::default(),
        }
    }

    fn set_state(&mut self, state: VmState) -> Result<(), Problem> {
        self.paused = state == VmState::Paused;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Problem> {
        Err(Problem::new(
            Kind::Internal,
            "made-up guests do not stop",
            "leave it",
        ))
    }

    fn tasks(&mut self) -> Result<Vec<Task>, Problem> {
        Ok(vec![task(1, "init"), task(77, "evil\x1b[2J")])
    }

    fn symbols(&mut self) -> Result<Vec<Symbol>, Problem> {
        Ok(vec![
            symbol("ffffffff81000000", 'T', "_text", None),
            symbol("ffffffffc0000000", 't', "init", Some("dummy")),
        ])
    }

    fn stack(&mut self, pid: i32) -> Result<TaskStack, Problem> {
        let frame = |symbol: &str, scheduler| StackFrame {
            ip: "0xffffffff81000000".to_owned(),
            symbol: symbol.to_owned(),
            scheduler,
        };
        match pid {
            1 => Ok(TaskStack {
                task: task(1, "init"),
                reliable: true,
                reason: None,
                frames: vec![
                    frame("schedule+0x5e/0xb0", true),
                    frame("do_wait+0x5a/0x120", false),
                ],
            }),
            _ => Err(Problem::new(
                Kind::NotFound,
                format!("no task with pid {pid}"),
                "look",
            )),
        }
    }

    fn stacks(&mut self) -> Result<Vec<TaskStack>, Problem> {
        let evil = TaskStack {
            task: task(77, "evil\x1b[2J"),
            reliable: false,
            reason: Some("no rule for this code".to_owned()),
            frames: vec![],
        };
        Ok(vec![self.stack(1)?, evil])
    }

    fn dump(&mut self, path: &Path) -> Result<Dump, Problem> {
        Ok(Dump {
            path: path.display().to_string(),
            bytes: 3 << 20,
            paused_us: 1500,
        })
    }

    fn patches(&mut self) -> Vec<PatchStatus> {
        self.patches.clone()
    }

    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem> {
        if module != b"fix" {
            let why = "this is no ELF file";
            return Err(Problem::new(Kind::BadModule, why, "build one"));
        }
        Ok(CheckReport {
            name: "fix".into(),
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
                address: "0xffffffff81800000".into(),
                bytes: 96,
                hidden: false,
            },
            data: Some(AllocationReport {
                address: "0xfffffffff2000000".into(),
                bytes: 8,
                hidden: true,
            }),
            tasks: vec![
                report(77, "stuck"),
                TaskReport {
                    switched_by: Some(SwitchedBy::Stack),
                    blocker: None,
                    since_ms: None,
                    ..report(1, "init")
                },
            ],
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
        if mode == Mode::StopMachine {
            let why = "not all tasks can be moved in one pause: 77 stuck in do_wait+0x5";
            return Err(Problem::new(Kind::Conflict, why, "see the status"));
        }
        let name = match module {
            b"fix" => "fix",
            b"stuck" => "stuck",
            _ => {
                let why = "this is no ELF file";
                return Err(Problem::new(Kind::BadModule, why, "build one"));
            }
        };
        self.polls = 0;
        self.patches.push(PatchStatus {
            name: name.to_owned(),
            phase: PatchPhase::Applying,
            enabled: true,
            transition: true,
            force: false,
            replace: false,
            signal: false,
            functions: vec![FunctionReport {
                object: "vmlinux".to_owned(),
                name: "cmdline_proc_show".to_owned(),
                sympos: 0,
                patched: true,
            }],
            tasks: vec![report(1, "init"), report(77, "stuck")],
            transition_ms: 0,
            pauses: PauseReport {
                count: 2,
                total_us: 300,
                longest_us: 200,
                ..PauseReport::default()
            },
        });
        Ok(name.to_owned())
    }

    fn cancel(&mut self, name: &str) -> Result<(), Problem> {
        for patch in self.patches.iter_mut().filter(|p| p.name == name) {
            patch.enabled = !patch.enabled;
            patch.phase = match patch.enabled {
                true => PatchPhase::Applying,
                false => PatchPhase::Reverting,
            };
        }
        self.polls = 0;
        Ok(())
    }

    /// What is stuck is so no longer.
    fn force(&mut self, name: &str) -> Result<(), Problem> {
        for patch in self.patches.iter_mut().filter(|p| p.name == name) {
            patch.force = true;
        }
        self.polls = 0;
        Ok(())
    }

    fn revert(&mut self, name: &str, _mode: Mode) -> Result<(), Problem> {
        self.polls = 0;
        for patch in self.patches.iter_mut().filter(|p| p.name == name) {
            patch.phase = PatchPhase::Reverting;
            (patch.enabled, patch.transition) = (false, true);
            patch.tasks = vec![report(1, "init")];
        }
        Ok(())
    }

    /// What is stuck is so no longer once it is signalled.
    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem> {
        let known = self
            .patches
            .iter_mut()
            .find(|p| p.name == name && p.transition);
        let Some(patch) = known else {
            let why = format!("patch {name} is not in transition");
            return Err(Problem::new(Kind::Conflict, why, "see the status"));
        };
        patch.signal = after.is_zero();
        Ok(())
    }

    fn poll(&mut self) {
        let Some(patch) = self.patches.iter_mut().find(|p| p.transition) else {
            return;
        };
        self.polls += 1;
        let stuck = patch.name == "stuck"
            && patch.phase == PatchPhase::Applying
            && !patch.signal
            && !patch.force;
        for task in patch.tasks.iter_mut().filter(|t| !stuck || t.pid == 1) {
            task.switched_by = Some(SwitchedBy::Stack);
            task.blocker = None;
            task.after_ms = Some(u64::from(self.polls));
        }
        if stuck || self.polls < 3 {
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
        runs.then(|| Instant::now() + Duration::from_millis(20))
    }
}
