//! Tests of the nested bed from outside: what a command in it sees, what is passed through, and
//! that no process or file remains afterwards.
//!
//! They start real nested beds, also on hosts whose own KVM runs stock kernels.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guests::bed::{Bed, BedError, counts};
use guests::drive::build_outpatch;
use guests::host::cache::Cache;
use guests::kernel::patches::SAMPLE;
use guests::kernel::prepared::{KernelSpec, PreparedKernel};
use guests::kernel::{Flavour, Generation};
use serde_json::Value;

/// More than any of these commands takes on a busy host.
const LIMIT: Duration = Duration::from_secs(200);

fn bed() -> Bed {
    Bed::new().nested().limit(LIMIT)
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// A folder of the host, deleted when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path =
            std::env::temp_dir().join(format!("outpatch-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_command_sees_the_hosts_files_and_a_real_kvm_and_its_streams_stay_separate() {
    let here = Folder::new("words");
    fs::write(here.0.join("file"), "the host's\n").unwrap();
    let script = r#"
        read line; echo "input: $line"; cat >/dev/null
        pwd; cat file; echo "word: $WORD"
        ls -d /sys/module/kvm_amd; test -w /dev/kvm && echo kvm
        touch /usr/written 2>/dev/null || echo read-only
        echo private > mine && cat mine
        echo complaint >&2
        exit 7"#;
    let output = bed()
        .output(
            shell(script).current_dir(&here.0).env("WORD", "a b"),
            b"first\nsecond\n",
        )
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let folder = here.0.display();
    let expected = format!(
        "input: first\n{folder}\nthe host's\nword: a b\n\
         /sys/module/kvm_amd\nkvm\nread-only\nprivate\n"
    );
    assert_eq!(stdout, expected, "stderr: {stderr}");
    assert_eq!(stderr, "complaint\n");
    assert_eq!(output.status.code(), Some(7));
    assert!(
        !here.0.join("mine").exists(),
        "a folder that was not named as writable was written on the host"
    );
}

#[test]
fn writable_folders_are_written_on_the_host_and_a_signal_is_reported_as_one() {
    let out = Folder::new("writable");
    let script = "head -c 3000000 /dev/zero; echo kept > $0/file; kill -9 $$";
    let output = bed()
        .writable(&out.0)
        .output(shell(script).arg(&out.0), b"")
        .unwrap();
    assert_eq!(output.stdout.len(), 3_000_000);
    assert_eq!(output.status.signal(), Some(9));
    assert_eq!(fs::read_to_string(out.0.join("file")).unwrap(), "kept\n");
}

#[test]
fn a_bed_that_dies_or_times_out_is_not_the_commands_failure() {
    let lost = counts().lost;
    let crash = "echo before; sleep 1; echo c > /proc/sysrq-trigger; sleep 100";
    match bed().output(&mut shell(crash), b"") {
        Err(BedError::Died { console, .. }) => {
            assert!(console.contains("Kernel panic"), "{console}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(counts().lost, lost + 1);
    let short = Duration::from_secs(1);
    let result = bed().limit(short).output(&mut shell("sleep 1000"), b"");
    assert!(
        matches!(result, Err(BedError::TimedOut(l)) if l == short),
        "{result:?}"
    );
    assert_eq!(
        counts().lost,
        lost + 1,
        "a bed that was stopped is not counted as lost"
    );
}

/// Starts the `bed` program with a command that does not end, and waits until the command runs.
/// Returns the program and the process ids of its children.
fn endless() -> (Child, Vec<u32>) {
    // The caller may have set the interrupt to be ignored, as shells do for background jobs.
    let mut bed = Command::new("env")
        .args(["--default-signal=INT", env!("CARGO_BIN_EXE_bed")])
        .args(["run", "--nested", "--"])
        .args(["sh", "-c", "echo runs; exec sleep 10000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let out = bed.stdout.take().unwrap();
    BufReader::new(out).read_line(&mut line).unwrap();
    assert_eq!(line, "runs\n");
    let children = children_of(bed.id());
    assert_eq!(children.len(), 2, "QEMU and the file server");
    (bed, children)
}

fn children_of(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(
            list.split_whitespace()
                .filter_map(|p| p.parse::<u32>().ok()),
        );
    }
    found
}

fn gone(pid: u32) -> bool {
    // A zombie counts as gone: it has ended, but its parent has not waited for it yet.
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit(')')
            .next()
            .is_some_and(|s| s.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

fn signal(name: &str, pid: u32) {
    let status = Command::new("kill")
        .args([name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

/// A program with its arguments, run as another user when this process is root: a user with groups
/// that it may not leave, and who may have few files open.
fn as_ordinary_user(program: &Path, home: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--groups=65534,4,24"])
        .args(["prlimit", "--nofile=1024:4096", "--"])
        .arg(program)
        .env("HOME", home)
        .env_remove("OUTPATCH_CACHE")
        .env_remove("XDG_CACHE_HOME");
    command
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Gives that user a cache with what a bed needs from `from`, which is this user's.
fn copy_bed_files(from: &Path, home: &Path) {
    let cache = home.join(".cache/outpatch");
    fs::create_dir_all(cache.join("packages")).unwrap();
    let index = fs::read_to_string(from.join("packages.json")).unwrap();
    let index: BTreeMap<String, Value> = serde_json::from_str(&index).unwrap();
    let needed = ["qemu-", "seabios", "linux-image-6.12"];
    let mut roots: Vec<PathBuf> = index
        .iter()
        .filter(|(name, _)| needed.iter().any(|start| name.starts_with(start)))
        .filter(|(name, _)| !name.contains(":"))
        .map(|(_, package)| PathBuf::from(package["root"].as_str().unwrap()))
        .collect();
    fs::create_dir_all(cache.join("libraries")).unwrap();
    for entry in fs::read_dir(from.join("libraries")).unwrap().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap();
        let list: Vec<Value> = serde_json::from_str(&text).unwrap();
        roots.extend(
            list.iter()
                .map(|p| PathBuf::from(p["root"].as_str().unwrap())),
        );
        write_moved(
            &text,
            from,
            &cache,
            &cache.join("libraries").join(entry.file_name()),
        );
    }
    let text = serde_json::to_string(&index).unwrap();
    write_moved(&text, from, &cache, &cache.join("packages.json"));
    roots.sort_unstable();
    roots.dedup();
    let copied = Command::new("cp")
        .arg("-a")
        .args(&roots)
        .arg(cache.join("packages"))
        .status()
        .unwrap();
    assert!(copied.success());
    let owned = Command::new("chown")
        .args(["-R", "65534:65534"])
        .arg(home)
        .status();
    assert!(owned.unwrap().success());
}

/// Writes what the demo needs in the bed into `home`, with the files themselves.
fn write_plan(home: &Path) {
    let copy = |file: &Path, name: &str| {
        let copy = home.join(name);
        fs::copy(file, &copy).unwrap();
        copy
    };
    let mut kernel = PreparedKernel::prepare(KernelSpec {
        generation: Generation::V6_12,
        flavour: Flavour::Cloud,
        patches: &[SAMPLE],
        modules: &[],
        boot: None,
    })
    .unwrap();
    kernel.bzimage = copy(&kernel.bzimage, "bzimage");
    kernel.initrd = copy(&kernel.initrd, "initrd");
    let patch = copy(Path::new(kernel.patch(SAMPLE).unwrap()), "sample.ko");
    kernel.patches.insert(SAMPLE.to_owned(), Ok(patch));
    let outpatch = copy(&build_outpatch().unwrap(), "outpatch");
    let plan = serde_json::json!({ "outpatch": outpatch, "kernel": kernel });
    fs::write(home.join("plan.json"), plan.to_string()).unwrap();
}

/// Writes an index of packages for a cache that has moved.
fn write_moved(text: &str, from: &Path, to: &Path, path: &Path) {
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn an_ordinary_user_has_a_bed_that_outlasts_a_walk_over_many_files_and_patches_a_guest() {
    // More than the descriptors that the file server has here.
    const FILES: usize = 8_000;
    let home = Folder::new("user, with a space");
    if is_root() {
        bed().prepare().unwrap();
        copy_bed_files(Cache::open().unwrap().root(), &home.0);
    }
    let (tree, out) = (home.0.join("tree"), home.0.join("out"));
    for number in 0..FILES {
        let folder = tree.join((number / 1000).to_string());
        if number % 1000 == 0 {
            fs::create_dir_all(&folder).unwrap();
        }
        fs::write(folder.join(number.to_string()), b"").unwrap();
    }
    fs::write(home.0.join("last"), "the last\n").unwrap();
    // QEMU's options end at a comma, and the address of a socket has 107 bytes at most.
    let temporary = home.0.join("temporary, ".repeat(12));
    fs::create_dir_all(&out).unwrap();
    fs::create_dir_all(&temporary).unwrap();
    if is_root() {
        let owned = Command::new("chown")
            .arg("65534:65534")
            .args([&out, &temporary])
            .status();
        assert!(owned.unwrap().success());
    }
    // Not run from the folder that cargo made, which that user may not be able to read.
    let program = home.0.join("bed program");
    fs::copy(env!("CARGO_BIN_EXE_bed"), &program).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_demo"), home.0.join("demo")).unwrap();
    write_plan(&home.0);
    let script = r#"
        find tree -type f -size -1 | wc -l; cat last
        cat /proc/sys/fs/inode-nr >&2
        mkdir out/folder && echo kept > out/folder/file && chmod 600 out/folder/file
        exec ./demo --inside plan.json"#;
    let output = as_ordinary_user(&program, &home.0)
        .args(["run", "--nested", "--limit", "300", "--writable"])
        .arg(&out)
        .args(["--", "sh", "-c", script])
        .env("TMPDIR", &temporary)
        .current_dir(&home.0)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let walked = format!("{FILES}\nthe last\n");
    assert!(stdout.starts_with(&walked), "{stdout}{stderr}");
    assert!(
        stdout.contains("Reverted, in the guest"),
        "{stdout}{stderr}"
    );
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(
        fs::read_to_string(out.join("folder/file")).unwrap(),
        "kept\n"
    );
}

#[test]
fn two_beds_at_once_do_not_collide_and_a_killed_one_leaves_nothing() {
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(endless);
        let two = scope.spawn(endless);
        (one.join().unwrap(), two.join().unwrap())
    });
    for ((mut bed, children), how) in [(one, "-INT"), (two, "-KILL")] {
        let pid = bed.id();
        assert!(
            children.iter().all(|c| !gone(*c)),
            "{how}: its children ended when the other bed was killed"
        );
        signal(how, pid);
        bed.wait().unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while !children.iter().all(|c| gone(*c)) {
            assert!(
                Instant::now() < until,
                "{how}: processes are left: {children:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let sockets = format!("outpatch-bed-{pid}-");
        for entry in fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
            let name = entry.file_name();
            assert!(
                !name.to_string_lossy().starts_with(&sockets),
                "{how}: {name:?} is left"
            );
        }
    }
}

#[test]
fn the_bed_programs_exit_status_is_like_a_shells() {
    let bed = Path::new(env!("CARGO_BIN_EXE_bed"));
    let run = |arguments: &[&str]| {
        Command::new(bed)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let output = run(&["run", "--nested", "--", "/no/such/program"]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/program"));
    let output = run(&[
        "run",
        "--nested",
        "--writable",
        "/no/such/folder",
        "--",
        "true",
    ]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/folder"));
    let output = run(&["probe"]);
    assert_eq!(output.status.code(), Some(0));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.starts_with("native: ") || stdout.starts_with("nested: "),
        "{stdout}"
    );
}
