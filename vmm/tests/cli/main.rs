//! The command line against a VMM with a fake guest: what it prints, where, and its exit status.

mod run;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

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
fn tasks_and_stacks_are_printed_as_by_ps_and_proc() {
    let bench = Bench::new();
    assert_eq!(
        bench.ok(&["ps"]),
        "PID TGID S KIND VCPU PATCH COMM\n  \
         1    1 S user    0    -1 init\n \
         77    1 S user    -    -1 evil?[2J\n"
    );
    assert_eq!(
        bench.ok(&["stack", "1"]),
        "[<0>] do_wait+0x5a/0x120\nreliable\n"
    );
    let all = bench.ok(&["stack", "--all", "1"]);
    assert!(all.starts_with("[<0>] schedule+0x5e/0xb0\n"), "{all}");
    assert_eq!(bench.json(&["ps", "--json"])[1]["pid"], 77);
    let stack = bench.json(&["stack", "1", "--json"]);
    assert_eq!(stack["frames"].as_array().unwrap().len(), 2);
    let all_stacks = bench.ok(&["stack"]);
    assert_eq!(
        all_stacks,
        "1 init (S)\n[<0>] do_wait+0x5a/0x120\nreliable\n\n\
         77 evil?[2J (S)\nunreliable: no rule for this code\n\n"
    );
    let stacks = bench.json(&["stack", "--json"]);
    assert_eq!(stacks[0], stack);
    let line = refused(&bench.run(&["stack", "5"]), 1);
    assert_eq!(line, "outpatch: no task with pid 5; see GET /tasks\n");
}

#[test]
fn symbols_are_printed_as_kallsyms_is() {
    let bench = Bench::new();
    assert_eq!(
        bench.ok(&["symbols"]),
        "ffffffff81000000 T _text\nffffffffc0000000 t init\t[dummy]\n"
    );
    assert_eq!(bench.json(&["symbols", "--json"])[1]["module"], "dummy");
}

#[test]
fn a_check_says_what_apply_would_do_and_changes_nothing() {
    let bench = Bench::new();
    let module = bench.module("fix");
    let found = "vmlinux:cmdline_proc_show,0 at 0xffffffff81000100, 42 bytes\n";
    let uses = "uses seq_printf at 0xffffffff81000200\n";
    let memory = "code: 96 bytes at 0xffffffff81800000, in the padding of the kernel's text\n\
                  data: 8 bytes at 0xfffffffff2000000, in hidden memory\n";
    let heading = "    PID COMM            KIND    SWITCHED-BY  AFTER\n";
    let blocks = "     77 stuck           user    pending      \
                  blocked: in cmdline_proc_show+0x5/0x20\n";
    let switches = "      1 init            user    stack\n";
    let summary = "fix: would apply; 1 task would switch now (by stack); \
                   1 task would block the transition; \
                   guest paused 1 time, 0.200 ms in all, 0.200 ms at most\n";
    assert_eq!(
        bench.ok(&["check", &module]),
        [found, memory, blocks, summary].concat()
    );
    assert_eq!(
        bench.ok(&["check", "-v", &module]),
        [found, uses, memory, heading, blocks, switches, summary].concat()
    );
    let report = bench.json(&["check", &module, "--json"]);
    assert_eq!(
        report["tasks"][0]["blocker"],
        "in cmdline_proc_show+0x5/0x20"
    );
    assert_eq!(
        bench.json(&["status", "--json"])["patches"],
        serde_json::json!([])
    );
    let junk = bench.file("junk.ko", b"junk");
    let line = refused(&bench.run(&["check", &junk]), 1);
    assert!(line.contains("junk.ko: this is not an ELF file"), "{line}");
    refused(&bench.run(&["check", "/nowhere/x.ko"]), 1);
    let line = refused(&bench.run(&["check", &module, "--core", &junk]), 1);
    assert!(line.contains("it is not an ELF file"), "{line}");
}

#[test]
fn a_dump_goes_to_an_absolute_path() {
    let bench = Bench::new();
    assert_eq!(
        bench.ok(&["dump", "/cores/a"]),
        "/cores/a: 3 MiB, guest paused for 2 ms\n"
    );
    let here = std::env::current_dir().unwrap().join("a");
    let made = bench.json(&["dump", "a", "--json"]);
    assert_eq!(made["path"], here.to_str().unwrap());
}

#[test]
fn a_core_takes_the_place_of_a_socket() {
    let bench = Bench::new();
    let junk = bench.file("core", b"no core");
    // The socket in the environment has a guest; the core is read all the same.
    for command in [&["ps"][..], &["stack", "1"], &["symbols"]] {
        let line = refused(&bench.run(&[command, &["--core", &junk]].concat()), 1);
        assert!(line.contains("it is not an ELF file"), "{line}");
        assert!(line.contains(&junk), "{line}");
    }
    let line = refused(&bench.run(&["ps", "--core", "/nowhere/core"]), 1);
    assert!(line.starts_with("outpatch: /nowhere/core: "), "{line}");
    refused(&bench.run(&["ps", "--core", "/"]), 1);
    let line = refused(&bench.run(&["ps", "--core", &junk, "--socket", "/x"]), 2);
    assert!(line.contains("cannot be used with"), "{line}");
}

#[test]
fn a_patch_is_followed_to_its_end_and_back() {
    let bench = Bench::new();
    let module = bench.module("fix");
    let summary = "in 60 ms; 2 tasks switched (by stack); \
                   guest paused 2 times, 0.300 ms in all, 0.200 ms at most\n";
    assert_eq!(
        bench.ok(&["apply", &module]),
        format!("fix: applied {summary}")
    );
    let status = bench.ok(&["status"]);
    assert!(status.contains("kernel  6.1.0-test"), "{status}");
    assert!(status.contains("fix   applied"), "{status}");
    assert_eq!(bench.json(&["status", "fix", "--json"])["phase"], "applied");
    assert_eq!(bench.ok(&["revert"]), format!("fix: reverted {summary}"));
    let line = refused(&bench.run(&["revert"]), 1);
    assert_eq!(line, "outpatch: no patch is applied\n");
    let json = bench.json(&["apply", "--json", &module]);
    assert_eq!(json["phase"], "applied");
    let both = bench.json(&["status", "--json"]);
    assert_eq!(both["vm"]["cpus"], 2);
    assert_eq!(both["patches"][0]["phase"], "reverted");
}

#[test]
fn verbose_lists_every_task_of_a_transition() {
    let bench = Bench::new();
    let module = bench.module("fix");
    let tasks = "    PID COMM            KIND    SWITCHED-BY  AFTER\n      \
                 1 init            user    stack        1 ms\n     \
                 77 stuck           user    stack        1 ms\n";
    let summary = "in 60 ms; 2 tasks switched (by stack); \
                   guest paused 2 times, 0.300 ms in all, 0.200 ms at most\n";
    assert_eq!(
        bench.ok(&["apply", "-v", &module]),
        format!("fix: applying vmlinux:cmdline_proc_show\n{tasks}fix: applied {summary}")
    );
    let function = "vmlinux:cmdline_proc_show,0 new\n";
    assert_eq!(
        bench.ok(&["status", "fix"]),
        format!("fix: applied {summary}{function}")
    );
    assert_eq!(
        bench.ok(&["status", "fix", "--verbose"]),
        format!("fix: applied {summary}{function}{tasks}")
    );
    assert_eq!(
        bench.ok(&["revert", "--verbose"]),
        format!("fix: reverting vmlinux:cmdline_proc_show\n{tasks}fix: reverted {summary}")
    );
}

/// Asserts that `text` has `count` lines, with one on what is left out exactly when `cut`.
fn assert_lines(text: &str, count: usize, cut: bool) {
    assert_eq!(text.lines().count(), count, "{text}");
    assert_eq!(text.contains(" more (-v lists all)"), cut, "{text}");
}

#[test]
fn ten_thousand_tasks_are_a_few_lines_by_default() {
    const TASKS: usize = 10_000;
    let bench = Bench::with(FakeGuest::with_sleepers(9_998));
    let (fix, stuck) = (bench.module("fix"), bench.module("stuck"));
    assert_lines(&bench.ok(&["apply", &fix]), 1, false);
    assert_lines(&bench.ok(&["status", "fix"]), 2, false);
    assert_lines(&bench.ok(&["status"]), 5, false);
    assert_lines(&bench.ok(&["revert", "fix"]), 1, false);
    assert_lines(&bench.ok(&["apply", "-v", &fix]), TASKS + 3, false);
    assert_lines(&bench.ok(&["status", "-v", "fix"]), TASKS + 3, false);
    bench.ok(&["revert", "fix"]);

    // One function, code and data, 20 of 9,999 tasks, what is left out, and the summary.
    let text = bench.ok(&["check", &stuck]);
    assert_lines(&text, 25, true);
    assert!(text.contains("and 9979 more"), "{text}");
    assert_lines(&bench.ok(&["check", "-v", &stuck]), TASKS + 6, false);

    let blocked = bench.run(&["apply", "--timeout", "1.5", &stuck]);
    refused(&blocked, 4);
    let text = String::from_utf8(blocked.stdout).unwrap();
    // A heading, 20 of 9,999 tasks, and what is left out, once.
    assert_lines(&text, 22, true);
    assert!(text.ends_with("and 9979 more (-v lists all)\n"), "{text}");
    let text = bench.ok(&["status", "stuck"]);
    assert_lines(&text, 23, true);
    assert_lines(&bench.ok(&["cancel"]), 1, false);

    bench.ok(&["apply", "--no-wait", &stuck]);
    assert_lines(&bench.ok(&["force"]), 1, false);
    let verbose = bench.run(&["revert", "-v", "stuck"]);
    let text = String::from_utf8(verbose.stdout).unwrap();
    assert_lines(&text, TASKS + 3, false);
}

#[test]
fn a_patch_is_named_as_its_file_is() {
    let bench = Bench::new();
    let file = bench.file("livepatch-sample.ko", &module("livepatch_sample"));
    bench.ok(&["apply", &file]);
    for name in [
        "livepatch_sample",
        "livepatch-sample",
        "livepatch-sample.ko",
        &file,
    ] {
        let text = bench.ok(&["status", name]);
        assert!(text.starts_with("livepatch_sample: applied"), "{text}");
    }
    let text = bench.ok(&["revert", "livepatch-sample.ko"]);
    assert!(text.starts_with("livepatch_sample: reverted"), "{text}");
    refused(&bench.run(&["revert", "livepatch-samples"]), 1);
    assert_eq!(bench.run(&["status", ".ko"]).status.code(), Some(2));
}

#[test]
fn the_version_is_that_of_outpatch() {
    let version = concat!("outpatch ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(Bench::new().ok(&["--version"]), version);
}

#[test]
fn a_transition_is_cancelled_or_forced() {
    let bench = Bench::new();
    let module = bench.module("stuck");
    for command in ["cancel", "force"] {
        let line = refused(&bench.run(&[command]), 1);
        assert_eq!(line, "outpatch: no patch is in transition\n");
    }
    bench.ok(&["apply", "--no-wait", &module]);
    let text = bench.ok(&["cancel"]);
    assert!(text.contains("stuck: reverted"), "{text}");

    bench.ok(&["apply", "--no-wait", &module]);
    let ended = bench.json(&["force", "stuck", "--json"]);
    assert_eq!(
        (&ended["force"], &ended["phase"]),
        (&true.into(), &"applied".into())
    );
}

#[test]
fn a_mode_is_passed_on_and_a_refusal_is_printed() {
    let bench = Bench::new();
    let module = bench.module("stuck");
    let line = refused(&bench.run(&["apply", "--mode", "stop-machine", &module]), 1);
    assert!(
        line.contains("in one pause: 77 stuck in do_wait+0x5"),
        "{line}"
    );
    bench.ok(&["apply", "--mode", "auto", &bench.module("fix")]);
    let output = bench.run(&["apply", "--mode", "all", &module]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_signal_switches_a_blocked_task() {
    let bench = Bench::new();
    let module = bench.module("stuck");
    let line = refused(&bench.run(&["signal"]), 1);
    assert_eq!(line, "outpatch: no patch is in transition\n");
    bench.ok(&["apply", "--no-wait", &module]);
    let text = bench.ok(&["signal"]);
    assert!(text.starts_with("stuck: applying; "), "{text}");
    let ended = bench.json(&["status", "stuck", "--json"]);
    assert_eq!(ended["signal"], true, "{ended}");
    bench.ok(&["revert", "stuck"]);

    let text = bench.ok(&["apply", "--signal-after", "0", &module]);
    assert!(text.contains("stuck: applied"), "{text}");
}

#[test]
fn a_timeout_names_tasks_that_block_and_the_transition_continues() {
    let bench = Bench::new();
    let module = bench.module("stuck");
    let output = bench.run(&["apply", "--timeout", "1.2", &module]);
    let line = refused(&output, 4);
    assert_eq!(
        line,
        "outpatch: stuck is still applying, and the transition continues; \
         1 task pending: 77 stuck (in cmdline_proc_show+0x5/0x20)\n"
    );
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        shown.contains("77 stuck           user    pending      blocked: in cmdline_proc_show"),
        "{shown}"
    );
    assert_eq!(
        bench.json(&["status", "stuck", "--json"])["transition"],
        true
    );
    let reverted = bench.ok(&["revert", "stuck"]);
    assert!(reverted.contains("stuck: reverted"), "{reverted}");
}

#[test]
fn not_waiting_returns_at_once() {
    let bench = Bench::new();
    let module = bench.module("stuck");
    let text = bench.ok(&["apply", "--no-wait", &module]);
    assert!(text.starts_with("stuck: applying; "), "{text}");
    let output = bench.run(&["apply", "--no-wait", "--timeout", "3", &module]);
    assert_eq!(output.status.code(), Some(2));
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
fn a_missing_vmm_is_distinguished_from_one_that_refuses() {
    let bench = Bench::new();
    let absent = bench.dir.path().join("absent.sock");
    let line = refused(&outpatch(&absent, &["ps"]), 3);
    assert!(line.contains("no such socket"), "{line}");
    let stale = bench.dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let line = refused(&outpatch(&stale, &["ps"]), 3);
    assert!(line.contains("its VMM has ended"), "{line}");
    let file = bench.file("file", b"not a socket");
    refused(&outpatch(Path::new(&file), &["ps"]), 3);
    let mute = bench.dir.path().join("mute.sock");
    let listener = UnixListener::bind(&mute).unwrap();
    let hangs_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    refused(&outpatch(&mute, &["status"]), 3);
    hangs_up.join().unwrap();
    let no_socket = Command::new(env!("CARGO_BIN_EXE_outpatch"))
        .arg("ps")
        .env_remove("OUTPATCH_SOCKET")
        .output()
        .unwrap();
    assert_eq!(no_socket.status.code(), Some(2));
}

#[test]
fn a_second_vmm_does_not_take_the_socket() {
    let bench = Bench::new();
    let line = refused(&bench.run(&["run", "--kernel", "/nowhere"]), 1);
    assert!(line.contains("is in use by a running VMM"), "{line}");
    assert_eq!(bench.ok(&["resume"]), "running\n");
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
