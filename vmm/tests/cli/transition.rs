//! Commands that start a transition, follow it or end it, and `check`.

use vmm::api::testing::{FakeGuest, module};

use crate::{Bench, refused};

#[test]
fn a_check_says_what_apply_would_do_and_changes_nothing() {
    let bench = Bench::new();
    let module = bench.module("fix");
    let found = "vmlinux:cmdline_proc_show,0 at 0xffffffff81000100, 42 bytes\n";
    let uses = "uses seq_printf at 0xffffffff81000200\n";
    let memory = "code: 96 bytes at 0xfffffffff2000000, in hidden memory\n\
                  constants: 16 bytes at 0xfffffffff2200000, in hidden memory\n\
                  data: 1280 bytes at 0xfffffffff2400000, in hidden memory\n";
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

    // One function, code, constants and data, 20 of 9,999 tasks, what is left out, and the summary.
    let text = bench.ok(&["check", &stuck]);
    assert_lines(&text, 26, true);
    assert!(text.contains("and 9979 more"), "{text}");
    assert_lines(&bench.ok(&["check", "-v", &stuck]), TASKS + 7, false);

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
