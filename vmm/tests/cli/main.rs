//! The command line against a VMM with a fake guest: what it prints, where, and its exit status.

mod run;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hostile_guest::{cores, image};
use introspect::VcpuRegs;
use introspect::core_dump::notes;
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
fn what_is_read_of_a_dead_guest_has_one_warning() {
    let bench = Bench::with(FakeGuest::dead());
    for command in [&["ps"][..], &["stack"], &["stack", "1"]] {
        let output = bench.run(command);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let warning = String::from_utf8(output.stderr).unwrap();
        assert_eq!(warning, "outpatch: warning: tasklist_lock is?held\n");
        let plain = Bench::new().ok(command);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), plain);
    }
    let output = bench.run(&["ps", "--json"]);
    let tasks: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(tasks[1]["warning"], "tasklist_lock is\nheld");
    assert!(!output.stderr.is_empty());
}

/// A core file of the synthetic guest with this memory and these vCPUs.
fn made_up_core(bench: &Bench, memory: &[u8], vcpus: &[VcpuRegs]) -> String {
    let notes = notes::encode(vcpus, None);
    let memory = (cores::PT_LOAD, 0, memory.len() as u64, memory);
    let content = cores::bytes(&[(cores::PT_NOTE, 0, 0, &notes), memory]);
    bench.file("guest.core", &content)
}

#[test]
fn a_core_is_read_although_a_lock_is_held_in_it() {
    let bench = Bench::new();
    let mut memory = hostile_guest::ram().to_vec();
    // The writer's byte of tasklist_lock.
    memory[image::IMAGE + 0x2_0090] = 0xff;
    let core = made_up_core(&bench, &memory, &image::vcpus());
    for command in [&["ps"][..], &["stack"], &["stack", "1"]] {
        let output = bench.run(&[command, &["--core", &core, "--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let warning = String::from_utf8(output.stderr).unwrap();
        let start = "outpatch: warning: tasklist_lock is held for writing";
        assert!(warning.starts_with(start), "{warning}");
        assert_eq!(warning.lines().count(), 1, "{warning}");
        let answer = String::from_utf8(output.stdout).unwrap();
        assert!(answer.contains("tasklist_lock is held"), "{answer}");
    }
    // No lock matters for these.
    let symbols = bench.ok(&["symbols", "--core", &core]);
    assert!(symbols.contains(" schedule\n"));
}

#[test]
fn the_kernel_in_use_is_the_one_in_a_core_of_two() {
    let bench = Bench::new();
    let (memory, vcpus) = (image::two_kernels(), image::vcpus_of_two_kernels());
    let core = made_up_core(&bench, &memory, &vcpus);
    for command in [&["ps"][..], &["stack"], &["stack", "1"], &["symbols"]] {
        bench.ok(&[command, &["--core", &core]].concat());
    }
    let tasks = bench.json(&["ps", "--core", &core, "--json"]);
    assert_eq!(tasks[0]["vcpu"], 1, "{tasks}");
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
    assert_eq!(
        line,
        "outpatch: no patch is applied: there is nothing to revert\n"
    );
    for name in ["fix", "fix.ko"] {
        let line = refused(&bench.run(&["revert", name]), 1);
        assert_eq!(
            line,
            "outpatch: fix is already reverted: there is nothing to revert\n"
        );
    }
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
    let forced = "it was forced, so its code is never freed";
    let text = bench.ok(&["status", "stuck"]);
    assert!(text.contains(forced), "{text}");
    let text = bench.ok(&["revert", "stuck"]);
    assert!(text.contains(forced), "{text}");
    let text = bench.ok(&["status", "stuck"]);
    assert!(text.contains(forced), "{text}");
    let text = bench.ok(&["status"]);
    assert!(text.contains("reverted, forced"), "{text}");
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
    let blocked = "77 stuck           user    pending      blocked: in cmdline_proc_show";
    assert!(shown.contains(blocked), "{shown}");
    // Also without the patch's name.
    let status = bench.ok(&["status"]);
    assert!(status.contains("stuck applying"), "{status}");
    assert!(status.contains(blocked), "{status}");
    let all = bench.ok(&["status", "-v"]);
    assert_eq!(all.lines().count(), status.lines().count() + 2, "{all}");
    assert_eq!(
        bench.json(&["status", "stuck", "--json"])["transition"],
        true
    );
    let reverted = bench.ok(&["revert", "stuck"]);
    assert!(reverted.contains("stuck: reverted"), "{reverted}");
}

#[test]
fn a_paused_guest_is_named_as_what_delays_a_transition() {
    let bench = Bench::with(FakeGuest::stuck());
    let module = bench.module("fix");
    bench.ok(&["pause"]);
    let output = bench.run(&["apply", "--timeout", "1.5", &module]);
    refused(&output, 4);
    let shown = String::from_utf8(output.stdout).unwrap();
    let line = "the guest is paused: the transition continues when it runs (outpatch resume)\n";
    assert_eq!(shown.matches(line).count(), 1, "{shown}");
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

/// The commands that talk to a VMM, with arguments.
const COMMANDS: [&[&str]; 14] = [
    &["ps"],
    &["stack"],
    &["stack", "1"],
    &["symbols"],
    &["dump", "/nowhere/core"],
    &["status"],
    &["status", "fix"],
    &["signal"],
    &["cancel"],
    &["force"],
    &["revert"],
    &["pause"],
    &["resume"],
    &["stop"],
];

#[test]
fn every_command_gives_up_on_a_vmm_that_does_not_answer() {
    let dir = TempDir::new();
    let module = dir.path().join("fix.ko");
    std::fs::write(&module, module_bytes()).unwrap();
    let module = module.to_str().unwrap();
    let with_module: [&[&str]; 3] = [
        &["check", module],
        &["apply", module],
        &["apply", "--timeout", "1", module],
    ];
    let path = dir.path().join("mute.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    // And one whose queue of connections is full.
    let full = dir.path().join("full.sock");
    let listener = full_listener(&full);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for args in COMMANDS.into_iter().chain(with_module) {
            let path = &path;
            scope.spawn(move || {
                let line = refused(&outpatch(path, args), 3);
                let why = format!("nothing in 10 s from process {}", std::process::id());
                assert!(line.contains(&why), "{args:?}: {line}");
            });
        }
        scope.spawn(|| {
            let line = refused(&outpatch(&full, &["status"]), 3);
            assert!(line.contains("nothing in 10 s"), "{line}");
        });
    });
    assert!(started.elapsed() < Duration::from_secs(40));
    drop(listener);
}

/// A listener that accepts nothing, and with it the connection that fills its queue.
fn full_listener(path: &Path) -> (OwnedFd, UnixStream) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(path).unwrap())
}

/// Reads one request with its body, as far as it has arrived.
fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = [0; 4096];
    let len = stream.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

fn answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn a_vmm_that_hangs_when_it_is_to_stop_has_not_stopped() {
    let dir = TempDir::new();
    let path = dir.path().join("vm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&mut stream);
        stream.write_all(answer("200 OK", "{}").as_bytes()).unwrap();
        assert!(read_request(&mut stream).starts_with("DELETE /vm "));
        let vm = r#"{"state":"running","cpus":1,"memory":0,"pid":42,"kernel":null,
                     "pauses":{"count":0,"total_us":0,"longest_us":0,
                               "histogram":[0,0,0,0,0,0,0,0,0,0,0,0,0],"recent":[]}}"#;
        let accepted = answer("202 Accepted", vm);
        stream.write_all(accepted.as_bytes()).unwrap();
        (listener, stream)
    });
    let line = refused(&outpatch(&path, &["stop"]), 4);
    assert!(line.contains("has not ended after 15 s"), "{line}");
    drop(vmm.join().unwrap());
}

#[test]
fn a_refusal_of_a_large_module_is_printed() {
    let bench = Bench::new();
    let socket = bench.dir.path().join("vm.sock");
    // Both places for uploads are taken by clients that send nothing.
    let slots: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let head = "POST /checks HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    for len in LARGE {
        let file = bench.file("large.ko", &padded(len));
        for command in ["check", "apply"] {
            let line = refused(&bench.run(&[command, &file]), 1);
            assert!(line.contains("too many other modules"), "{len}: {line}");
        }
    }
    drop(slots);
}

/// As a server that closes with the request unread does.
#[test]
fn an_answer_is_read_when_the_request_cannot_be_sent_to_its_end() {
    let dir = TempDir::new();
    let path = dir.path().join("vm.sock");
    let file = dir.path().join("large.ko");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = std::thread::spawn(move || {
        for _ in LARGE {
            let (mut stream, _) = listener.accept().unwrap();
            read_request(&mut stream);
            stream.write_all(answer("200 OK", "{}").as_bytes()).unwrap();
            assert!(read_request(&mut stream).starts_with("POST /patches"));
            let problem = r#"{"kind":"unavailable","error":"not now","detail":"later"}"#;
            let refusal = answer("503 Service Unavailable", problem);
            stream.write_all(refusal.as_bytes()).unwrap();
        }
    });
    for len in LARGE {
        std::fs::write(&file, padded(len)).unwrap();
        let line = refused(&outpatch(&path, &["apply", file.to_str().unwrap()]), 1);
        assert!(line.ends_with("large.ko: not now; later\n"), "{line}");
    }
    vmm.join().unwrap();
}

/// Lengths of modules, from one that fills the socket's buffers on.
const LARGE: [usize; 4] = [72 << 10, 300 << 10, 2 << 20, 16 << 20];

/// A module of this length.
fn padded(len: usize) -> Vec<u8> {
    let mut bytes = module_bytes();
    bytes.resize(len, b' ');
    bytes
}

fn module_bytes() -> Vec<u8> {
    module("fix")
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
fn too_little_memory_is_called_that() {
    let bench = Bench::new();
    let mut image = vec![0; 3 * 512 + 4096];
    for (offset, bytes) in [
        (0x1f1, &[2][..]),
        (0x1f4, &256_u32.to_le_bytes()),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 2]),
        (0x211, &[1]),
        (0x236, &[1, 0]),
        (0x258, &(16_u64 << 20).to_le_bytes()),
        (0x260, &(2_u32 << 20).to_le_bytes()),
    ] {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    let kernel = bench.file("bzImage", &image);
    let socket = bench.dir.path().join("run.sock");
    for (size, has) in [("64K", "64 KiB"), ("1M", "1 MiB"), ("0", "0 KiB")] {
        let line = refused(
            &outpatch(&socket, &["run", "--kernel", &kernel, "--memory", size]),
            1,
        );
        assert_eq!(
            line,
            format!("outpatch: {has} of memory is too little: this kernel needs at least 19 MiB\n")
        );
    }
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
