//! How a process ends that runs a guest, and what it does to its terminal: with guests of a few
//! bytes of machine code, each in a process of its own, as signals and terminals belong to one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::builder::assemble;
use crate::console::terminal::testing::{is_cooked, pty};
use crate::vm::vcpu_set::tests::{CODE, real_mode};
use crate::vm::{Vm, open_kvm};

/// The environment variable that names what [`child`] does.
const PROGRAM: &str = "OUTPATCH_TEST_PROGRAM";
const SOON: Duration = Duration::from_secs(20);
/// How soon a signal must end a process.
const PROMPT: Duration = Duration::from_secs(2);

/// jmp $
const SPIN: &[u8] = &[0xeb, 0xfe];

/// Prints 100,000 bytes, more than a pipe takes, and switches the machine off:
/// mov dx, 0x3f8 ; mov si, 0x1000 ; mov cx, 50000 ; rep outsb ; (the same again without dx)
/// mov dx, 0x600 ; mov al, 0x34 ; out dx, al
const PRINT_AND_POWER_OFF: &[u8] = &[
    0xba, 0xf8, 0x03, 0xbe, 0x00, 0x10, 0xb9, 0x50, 0xc3, 0xf3, 0x6e, 0xbe, 0x00, 0x10, 0xb9, 0x50,
    0xc3, 0xf3, 0x6e, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee,
];

/// Prints "ready!" and then what is typed:
/// mov dx, 0x3f9 ; mov al, 1 ; out dx, al ; dec dx ; mov si, text ; mov cx, 6 ; rep outsb
/// next: mov dx, 0x3fd ; in al, dx ; test al, 1 ; jz next ; mov dx, 0x3f8 ; in al, dx
/// out dx, al ; jmp next ; text:
const ECHO: &[u8] = &[
    0xba, 0xf9, 0x03, 0xb0, 0x01, 0xee, 0x4a, 0xbe, 0x1f, 0x10, 0xb9, 0x06, 0x00, 0xf3, 0x6e, 0xba,
    0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xf1, 0x90, b'r',
    b'e', b'a', b'd', b'y', b'!',
];

/// Switches kvmclock on, prints "R", and then "S" whenever PVCLOCK_GUEST_STOPPED is set there:
/// mov ecx, MSR_KVM_SYSTEM_TIME_NEW ; mov eax, 0x3001 ; xor edx, edx ; wrmsr ; mov dx, 0x3f8
/// mov al, 'R' ; out dx, al ; next: test byte [0x301d], 2 ; jz next ; and byte [0x301d], 0xfd
/// mov al, 'S' ; out dx, al ; jmp next
const CLOCK: &[u8] = &[
    0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, 0x66, 0xb8, 0x01, 0x30, 0x00, 0x00, 0x66, 0x31, 0xd2, 0x0f,
    0x30, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xf6, 0x06, 0x1d, 0x30, 0x02, 0x74, 0xf9, 0x80, 0x26,
    0x1d, 0x30, 0xfd, 0xb0, b'S', 0xee, 0xeb, 0xef,
];

#[test]
#[ignore = "the program that the other tests start"]
fn child() {
    let Ok(program) = std::env::var(PROGRAM) else {
        return;
    };
    signals::end_on_signals().unwrap();
    let code = match program.as_str() {
        "hang" => loop {
            thread::park();
        },
        "spin" => SPIN,
        "print-and-power-off" => PRINT_AND_POWER_OFF,
        "echo" => ECHO,
        "clock" => CLOCK,
        other => panic!("no program {other}"),
    };
    let (vm, vcpus) = Vm::new(&open_kvm().unwrap(), 2 << 20, 1).unwrap();
    let ram = vm.memory().ram();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    real_mode(&vcpus[0].0, 0);
    let built = assemble(vm, vcpus, duplicate_stream(io::stdout()).unwrap()).unwrap();
    let stdin = duplicate_stream(io::stdin()).unwrap();
    let kind = run_built(built, stdin, signals::event().unwrap(), ()).unwrap();
    std::process::exit(match kind {
        ExitKind::Signal(signal) => 128 + signal,
        _ => 0,
    });
}

/// A process that is killed when this is dropped.
struct Process(Child);

impl Process {
    /// Starts [`child`] as `program`, its standard error with ours.
    fn start(program: &str, stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(CHILD_ARGS).env(PROGRAM, program);
        Process(command.stdin(stdin).stdout(stdout).spawn().unwrap())
    }

    /// Waits until [`child`] has vCPU threads (or has none any more).
    fn wait_for_vcpus(&self, present: bool) {
        let tasks = format!("/proc/{}/task", self.0.id());
        wait_until(&format!("vCPU threads: {present}"), || {
            let names = thread_names(Path::new(&tasks));
            // The console's thread is there before the first and after the last vCPU's.
            names.iter().any(|name| name == "console-out")
                && names.iter().any(|name| name.starts_with("vcpu")) == present
        });
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// The exit status, when the process ends in time.
    fn status_within(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert_eq!(status.signal(), None, "it ends by itself");
                return status.code();
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const CHILD_ARGS: [&str; 4] = ["--ignored", "--exact", "run::tests::child", "--nocapture"];

fn thread_names(tasks: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(tasks).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_ends_a_process_that_hangs_before_the_event_loop() {
    let mut process = Process::start("hang", Stdio::null(), Stdio::null());
    let tasks = format!("/proc/{}/task", process.0.id());
    wait_until("the watchdog", || {
        let names = thread_names(Path::new(&tasks));
        names.iter().any(|name| name == "signals")
    });
    // The thread is started just before the signals are caught.
    thread::sleep(Duration::from_millis(100));
    process.signal(Signal::TERM);
    assert_eq!(process.status_within(PROMPT), Some(128 + 15));
}

#[test]
fn a_signal_ends_a_running_guest() {
    let mut process = Process::start("spin", Stdio::null(), Stdio::null());
    process.wait_for_vcpus(true);
    thread::sleep(Duration::from_millis(200));
    process.signal(Signal::TERM);
    assert_eq!(process.status_within(PROMPT), Some(128 + 15));
}

#[test]
fn a_signal_ends_the_wait_for_output_that_is_not_read() {
    let mut process = Process::start("print-and-power-off", Stdio::null(), Stdio::piped());
    process.wait_for_vcpus(false);
    assert_eq!(
        process.status_within(Duration::from_millis(200)),
        None,
        "the last output has no limit"
    );
    process.signal(Signal::TERM);
    assert_eq!(process.status_within(PROMPT), Some(128 + 15));
}

#[test]
fn ctrl_a_x_ends_the_wait_for_output_that_is_not_read() {
    let (mut user, terminal) = pty();
    let stdin = terminal.try_clone().unwrap();
    let mut process = Process::start("print-and-power-off", stdin, Stdio::piped());
    process.wait_for_vcpus(false);
    wait_until("raw mode", || !is_cooked(&terminal));
    user.write_all(b"\x01x").unwrap();
    assert_eq!(process.status_within(PROMPT), Some(0));
    assert!(is_cooked(&terminal));
}

#[test]
fn output_that_is_read_late_arrives_whole() {
    let mut process = Process::start("print-and-power-off", Stdio::null(), Stdio::piped());
    process.wait_for_vcpus(false);
    let mut all = Vec::new();
    process
        .0
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut all)
        .unwrap();
    assert_eq!(process.status_within(PROMPT), Some(0));
    let printed: Vec<u8> = all.into_iter().rev().take(100_000).rev().collect();
    assert!(printed.starts_with(PRINT_AND_POWER_OFF) && printed.len() == 100_000);
}

/// A terminal with a session on it, and all that was printed there.
struct Session {
    user: File,
    terminal: OwnedFd,
    text: Arc<Mutex<String>>,
    _shell: Process,
}

impl Session {
    /// Runs `script` in a shell on a new terminal; its arguments start [`child`] as `program`.
    fn start(script: &str, program: &str) -> Session {
        let (user, terminal) = pty();
        let stream = || terminal.try_clone().unwrap();
        let mut command = Command::new("setsid");
        command
            .args(["--wait", "--ctty", "sh", "-c", script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(CHILD_ARGS)
            .env(PROGRAM, program);
        command.stdin(stream()).stdout(stream()).stderr(stream());
        let shell = Process(command.spawn().unwrap());
        let text = Arc::<Mutex<String>>::default();
        let (mut reader, printed) = (user.try_clone().unwrap(), Arc::clone(&text));
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut chunk) {
                let chunk = String::from_utf8_lossy(&chunk[..count]);
                printed.lock().unwrap().push_str(&chunk);
            }
        });
        Session {
            user,
            terminal,
            text,
            _shell: shell,
        }
    }

    fn wait_for(&self, what: &str) {
        let deadline = Instant::now() + SOON;
        while !self.text.lock().unwrap().contains(what) {
            let text = self.text.lock().unwrap().clone();
            assert!(Instant::now() < deadline, "no {what:?} in {text:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_until_cooked(&self, cooked: bool) {
        wait_until(&format!("cooked: {cooked}"), || {
            is_cooked(&self.terminal) == cooked
        });
    }

    fn type_in(&mut self, text: &[u8]) {
        self.user.write_all(text).unwrap();
    }
}

#[test]
fn a_background_job_runs_and_has_the_terminal_only_in_the_foreground() {
    let script = "set -m; \"$@\" & echo pid=$!.; read line; fg; echo stopped; read line; fg; \
                  echo status=$?.";
    let mut session = Session::start(script, "echo");
    let modes = tcgetattr(&session.terminal).unwrap();
    session.wait_for("ready!");
    assert!(is_cooked(&session.terminal), "the modes are the shell's");
    session.type_in(b"go\n");
    session.wait_until_cooked(false);
    session.type_in(b"typed-1\r");
    session.wait_for("typed-1");

    // Stopped from elsewhere; the shell sets its modes, and later continues the job.
    let text = session.text.lock().unwrap().clone();
    let pid = text
        .split("pid=")
        .nth(1)
        .unwrap()
        .split('.')
        .next()
        .unwrap();
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    session.wait_for("stopped");
    tcsetattr(&session.terminal, OptionalActions::Now, &modes).unwrap();
    session.type_in(b"go\n");
    session.wait_until_cooked(false);
    session.type_in(b"typed-2\r");
    session.wait_for("typed-2");
    session.type_in(b"\x01x");
    session.wait_for("status=0.");
    assert!(is_cooked(&session.terminal));
}

#[test]
fn a_job_of_timeout_is_not_stopped() {
    let mut session = Session::start("timeout 2 \"$@\"; echo status=$?.", "echo");
    session.wait_for("ready!");
    // What is typed is for the foreground, of which `timeout` has taken the process out.
    session.type_in(b"typed\n");
    session.wait_for("status=124.");
    assert!(is_cooked(&session.terminal));
}

#[test]
fn the_guest_is_notified_when_the_process_was_stopped() {
    let mut process = Process::start("clock", Stdio::null(), Stdio::piped());
    let mut stdout = process.0.stdout.take().unwrap();
    let text = Arc::<Mutex<String>>::default();
    let printed = Arc::clone(&text);
    thread::spawn(move || {
        let mut byte = [0];
        while stdout.read(&mut byte).unwrap_or(0) == 1 {
            printed.lock().unwrap().push(byte[0].into());
        }
    });
    wait_until("R", || text.lock().unwrap().contains('R'));
    thread::sleep(Duration::from_millis(100));
    process.signal(Signal::STOP);
    thread::sleep(Duration::from_millis(1500));
    assert!(!text.lock().unwrap().contains('S'));
    process.signal(Signal::CONT);
    wait_until("S", || text.lock().unwrap().contains('S'));
}
