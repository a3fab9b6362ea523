//! The command line against a VMM with a fake guest: what it prints, where, and its exit status.

mod connection;
mod inspect;
mod run;
mod transition;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use vmm::api::testing::{FakeGuest, TempDir, module};
use vmm::api::{ControlSocket, Limits, Server};

/// A directory with the control socket of a served fake guest.
struct Bench {
    // Dropped before the directory.
    _server: Server,
    dir: TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(FakeGuest::default())
    }

    fn with(guest: FakeGuest) -> Bench {
        let dir = TempDir::new();
        let socket = ControlSocket::claim(&dir.path().join("vm.sock")).unwrap();
        let server = Server::start(socket, guest, Limits::default()).unwrap();
        Bench {
            _server: server,
            dir,
        }
    }

    /// The path of a module file whose patch is named `name`.
    fn module(&self, name: &str) -> String {
        self.file(&format!("{name}.ko"), &module(name))
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn run(&self, args: &[&str]) -> Output {
        outpatch(&self.dir.path().join("vm.sock"), args)
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }
}

fn outpatch(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outpatch"))
        .args(args)
        .env("OUTPATCH_SOCKET", socket)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Asserts that a command failed with this status and one line on standard error; returns the line.
fn refused(output: &Output, status: i32) -> String {
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    let line = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    assert!(line.starts_with("outpatch: "), "{line}");
    line
}

#[test]
fn the_version_is_that_of_outpatch() {
    let version = concat!("outpatch ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(Bench::new().ok(&["--version"]), version);
}

#[test]
fn pause_and_resume_print_the_state() {
    let bench = Bench::new();
    assert_eq!(bench.ok(&["pause"]), "paused\n");
    assert_eq!(bench.json(&["status", "--json"])["vm"]["state"], "paused");
    assert_eq!(bench.ok(&["resume"]), "running\n");
    assert_eq!(bench.json(&["resume", "--json"])["state"], "running");
    let unstoppable = Bench::with(FakeGuest::unstoppable());
    refused(&unstoppable.run(&["stop"]), 1);
}

#[test]
fn a_failure_is_one_line_and_an_exit_status() {
    let bench = Bench::new();
    let junk = bench.file("junk.ko", b"junk");
    let line = refused(&bench.run(&["apply", &junk]), 1);
    assert_eq!(
        line,
        format!("outpatch: {junk}: this is not an ELF file; build one\n")
    );
    let line = refused(&bench.run(&["apply", "/nowhere/x.ko"]), 1);
    assert!(line.contains("/nowhere/x.ko"), "{line}");
    refused(&bench.run(&["apply", "/"]), 1);
    refused(&bench.run(&["status", "../vm"]), 1);
    refused(&bench.run(&["revert", "none"]), 1);
    for timeout in ["-1", "x", "nan", "1e400"] {
        let output = bench.run(&["apply", &junk, &format!("--timeout={timeout}")]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn a_pipe_that_is_not_written_to_does_not_hang_a_command() {
    let bench = Bench::new();
    let fifo = bench.dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let started = Instant::now();
    let fifo = fifo.to_str().unwrap();
    let line = refused(&bench.run(&["apply", "--timeout", "0.5", fifo]), 1);
    assert!(line.contains("it did not end in 0.5 s"), "{line}");
    assert!(started.elapsed() < Duration::from_secs(10));
    let line = refused(&bench.run(&["check", fifo]), 1);
    assert!(line.contains("it did not end in 30 s"), "{line}");
    // Other files are large, and must be regular ones.
    let socket = bench.dir.path().join("run.sock");
    for args in [&["ps", "--core", fifo][..], &["run", "--kernel", fifo]] {
        let line = refused(&outpatch(&socket, args), 1);
        assert!(line.contains("not a regular file"), "{line}");
    }
}

#[test]
fn a_closed_pipe_is_no_error() {
    let bench = Bench::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_outpatch"))
        .args(["ps", "--socket"])
        .arg(bench.dir.path().join("vm.sock"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
