//! What the tests of this module share: a folder of their own, a control without a guest, and a client of few words.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use introspect::TaskKind;
use patcher::{
    AllocationReport, CheckReport, FoundFunction, FoundSymbol, FunctionReport, Mode, PatchPhase,
    PatchStatus, PauseLength, PauseReport, SwitchedBy, TaskReport,
};

use crate::api::control::Control;
use crate::api::problem::{Kind, Problem};
use crate::api::server::{Limits, Server};
use crate::api::socket::ControlSocket;
use crate::api::types;

/// What the fake guest takes for a module.
pub(crate) const ELF: &[u8] = b"\x7fELF and more";

/// A folder that goes with its owner.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("outpatch-{}-{unique}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A guest of one task. Its patches switch at the second poll. What was done is written down.
#[derive(Debug, Default)]
pub(crate) struct FakeGuest {
    log: Arc<Mutex<Vec<String>>>,
    /// How long a look at the tasks takes.
    slowness: Duration,
    paused: bool,
    patches: Vec<PatchStatus>,
    polls_left: u32,
    /// Whether its patches never switch.
    stuck: bool,
}

impl FakeGuest {
    pub fn stuck() -> FakeGuest {
        FakeGuest {
            stuck: true,
            ..FakeGuest::default()
        }
    }

    pub fn slow(slowness: Duration) -> FakeGuest {
        FakeGuest {
            slowness,
            ..FakeGuest::default()
        }
    }

    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }
}

pub(crate) fn task(pid: i32) -> types::Task {
    types::Task {
        pid,
        tgid: pid,
        state: 'S',
        kind: TaskKind::User,
        vcpu: None,
        cpu: Some(0),
        patch_state: Some(-1),
        comm: "init".into(),
    }
}

/// The guest's task, in the way of a patch.
fn blocked() -> TaskReport {
    TaskReport {
        pid: 1,
        comm: "init".into(),
        kind: TaskKind::User,
        state: 'S',
        switched_by: None,
        blocker: Some("in do_wait+0x1/0x2".into()),
        since_ms: None,
        signals: 0,
        after_ms: None,
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

    fn set_state(&mut self, state: types::VmState) -> Result<(), Problem> {
        self.paused = state == types::VmState::Paused;
        self.note(format!("{state:?}"));
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Problem> {
        self.note("stop");
        Ok(())
    }

    fn tasks(&mut self) -> Result<Vec<types::Task>, Problem> {
        std::thread::sleep(self.slowness);
        self.note("tasks");
        Ok(vec![task(1)])
    }

    fn stack(&mut self, pid: i32) -> Result<types::TaskStack, Problem> {
        if pid != 1 {
            let error = format!("no task with pid {pid}");
            return Err(Problem::new(Kind::NotFound, error, "look"));
        }
        Ok(types::TaskStack {
            task: task(1),
            reliable: true,
            reason: None,
            frames: vec![types::StackFrame {
                ip: "0xffffffff81000000".into(),
                symbol: "do_wait+0x1/0x2".into(),
                scheduler: false,
            }],
        })
    }

    fn stacks(&mut self) -> Result<Vec<types::TaskStack>, Problem> {
        self.stack(1).map(|stack| vec![stack])
    }

    fn symbols(&mut self) -> Result<Vec<types::Symbol>, Problem> {
        Ok(vec![types::Symbol {
            address: "0xffffffff81000000".into(),
            letter: 'T',
            name: "_text".into(),
            module: None,
        }])
    }

    fn dump(&mut self, path: &Path) -> Result<types::Dump, Problem> {
        self.note(format!("dump {}", path.display()));
        Ok(types::Dump {
            path: path.display().to_string(),
            bytes: 4096,
            paused_us: 7,
        })
    }

    fn patches(&mut self) -> Vec<PatchStatus> {
        self.patches.clone()
    }

    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem> {
        self.note(format!("check {}", module.len()));
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
            tasks: vec![blocked()],
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
        if !module.starts_with(b"\x7fELF") {
            return Err(Problem::new(Kind::BadModule, "not an\nELF file", "build"));
        }
        self.polls_left = 2;
        self.patches.push(PatchStatus {
            name: "fix".into(),
            phase: PatchPhase::Applying,
            enabled: true,
            transition: true,
            force: false,
            replace: false,
            signal: false,
            functions: vec![FunctionReport {
                object: "vmlinux".into(),
                name: "cmdline_proc_show".into(),
                sympos: 0,
                patched: true,
            }],
            tasks: vec![TaskReport {
                since_ms: Some(0),
                signals: 1,
                after_ms: Some(0),
                ..blocked()
            }],
            transition_ms: 0,
            pauses: PauseReport::default(),
        });
        Ok("fix".into())
    }

    fn cancel(&mut self, name: &str) -> Result<(), Problem> {
        self.note(format!("cancel {name}"));
        Ok(())
    }

    fn force(&mut self, name: &str) -> Result<(), Problem> {
        self.note(format!("force {name}"));
        Ok(())
    }

    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem> {
        self.note(format!("revert {name} {mode:?}"));
        self.polls_left = 2;
        for patch in self.patches.iter_mut().filter(|p| p.name == name) {
            patch.phase = PatchPhase::Reverting;
            (patch.enabled, patch.transition) = (false, true);
        }
        Ok(())
    }

    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem> {
        self.note(format!("signal {name} after {after:?}"));
        Ok(())
    }

    fn poll(&mut self) {
        self.polls_left = self.polls_left.saturating_sub(1);
        if self.stuck || self.polls_left > 0 {
            return;
        }
        if let Some(patch) = self.patches.iter_mut().find(|p| p.transition) {
            patch.transition = false;
            for task in &mut patch.tasks {
                task.switched_by = Some(SwitchedBy::Stack);
            }
            patch.phase = match patch.phase {
                PatchPhase::Applying => PatchPhase::Applied,
                _ => PatchPhase::Reverted,
            };
        }
    }

    fn due(&mut self) -> Option<Instant> {
        let runs = self.patches.iter().any(|p| p.transition);
        runs.then(|| Instant::now() + Duration::from_millis(5))
    }
}

/// A served fake guest.
pub(crate) struct Served {
    pub server: Option<Server>,
    pub socket: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    _dir: TempDir,
}

impl Served {
    pub fn new(guest: FakeGuest, limits: Limits) -> Served {
        let dir = TempDir::new();
        let socket = dir.path().join("vm.sock");
        let log = Arc::clone(&guest.log);
        let claimed = ControlSocket::claim(&socket).unwrap();
        let server = Server::start(claimed, guest, limits).unwrap();
        Served {
            server: Some(server),
            socket,
            log,
            _dir: dir,
        }
    }

    pub fn plain() -> Served {
        Served::new(FakeGuest::default(), Limits::default())
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends `bytes` as they are, and reads until the server closes.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Answer::read(&mut stream)
    }

    pub fn ask(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    pub fn logged(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(stream: &mut UnixStream) -> Answer {
        let mut bytes = Vec::new();
        // A reset behind the answer is as good as an end.
        if let Err(error) = stream.read_to_end(&mut bytes) {
            assert!(!bytes.is_empty(), "no answer: {error}");
        }
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        Answer {
            status: status.unwrap_or(0),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Asserts that it is a refusal of this kind, in one line.
    pub fn refused(&self, kind: Kind) {
        assert_eq!(self.status, kind.status().as_u16(), "{self:?}");
        let problem: types::Problem = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem.kind, kind.word());
        assert!(!problem.error.is_empty() && !problem.error.contains('\n'));
        assert!(!problem.detail.is_empty() && !problem.detail.contains('\n'));
    }
}
