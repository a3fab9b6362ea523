//! Commands that read a guest, live or in its core file: `ps`, `stack`, `symbols` and `dump`.

use hostile_guest::{cores, image};
use introspect::VcpuRegs;
use introspect::core_dump::notes;
use vmm::api::testing::FakeGuest;

use crate::{Bench, refused};

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
