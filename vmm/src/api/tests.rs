//! The server over a real socket, with a fake guest.

mod abi;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::api::problem::Kind;
use crate::api::routes::{MAX_MODULE, ROUTES};
use crate::api::server::Limits;
use crate::api::testing::{Answer, ELF, FakeGuest, Served, module};

#[test]
fn the_vm_is_described_paused_and_resumed() {
    let served = Served::plain();
    let vm = served.send("GET", "/vm", b"");
    assert_eq!(vm.status, 200);
    assert!(vm.head.contains("content-type: application/json"));
    assert_eq!(vm.json()["state"], "running");
    assert_eq!(vm.json()["kernel"], "6.1.0-test");
    let paused = served.send("PATCH", "/vm", br#"{"state":"paused"}"#);
    assert_eq!(
        (paused.status, &paused.json()["state"]),
        (200, &json!("paused"))
    );
    let running = served.send("PATCH", "/vm", br#"{"state":"running"}"#);
    assert_eq!(running.json()["state"], "running");
    let stopped = served.send("DELETE", "/vm", b"");
    assert_eq!(stopped.status, 202);
    assert_eq!(served.logged(), ["Paused", "Running", "stop"]);
}

#[test]
fn tasks_and_stacks_are_answered() {
    let served = Served::plain();
    let tasks = served.send("GET", "/tasks", b"").json();
    assert_eq!(
        tasks[0],
        json!({"pid": 1, "tgid": 1, "state": "S", "kind": "user", "vcpu": 0, "cpu": 0,
               "patch_state": -1, "comm": "init"})
    );
    let stack = served.send("GET", "/tasks/1/stack", b"").json();
    assert_eq!(stack["reliable"], true);
    assert_eq!(stack["frames"][1]["symbol"], "do_wait+0x5a/0x120");
    let all = served.send("GET", "/stacks", b"").json();
    assert_eq!(all[0], stack);
    assert_eq!(all[1]["task"]["pid"], 77);
    assert_eq!(all.as_array().map(Vec::len), Some(2));
    served
        .send("GET", "/tasks/7/stack", b"")
        .refused(Kind::NotFound);
    served
        .send("GET", "/tasks/init/stack", b"")
        .refused(Kind::BadRequest);
    served
        .send("GET", "/tasks/99999999999/stack", b"")
        .refused(Kind::BadRequest);
}

#[test]
fn a_patch_is_applied_polled_and_reverted() {
    let served = Served::plain();
    let started = served.send("POST", "/patches", ELF);
    assert_eq!(started.status, 201, "{started:?}");
    assert!(started.head.contains("location: /patches/fix"));
    assert_eq!(started.json()["phase"], "applying");
    wait_for_phase(&served, "applied");

    let again = served.send("PATCH", "/patches/fix", br#"{"enabled":true}"#);
    assert_eq!(again.json()["phase"], "applied");
    let reverting = served.send("PATCH", "/patches/fix", br#"{"enabled":false}"#);
    assert_eq!(reverting.json()["phase"], "reverting");
    wait_for_phase(&served, "reverted");
    let reverted = served.send("PATCH", "/patches/fix", br#"{"enabled":false}"#);
    assert_eq!(reverted.status, 200);
    served
        .send("PATCH", "/patches/fix", br#"{"enabled":true}"#)
        .refused(Kind::Conflict);
    assert_eq!(served.logged(), ["apply 8 PerTask", "revert fix PerTask"]);
}

#[test]
fn the_signal_is_sent_now_or_later_and_cannot_be_undone() {
    let served = Served::new(FakeGuest::stuck(), Limits::default());
    served.send("POST", "/patches", ELF);
    for body in [
        r#"{"signal":true}"#,
        r#"{"signal":true,"signal_after_ms":1500}"#,
    ] {
        let answer = served.send("PATCH", "/patches/fix", body.as_bytes());
        assert_eq!(
            (answer.status, &answer.json()["name"]),
            (200, &json!("fix"))
        );
    }
    for body in [
        "{}",
        r#"{"signal":false}"#,
        r#"{"signal_after_ms":3}"#,
        r#"{"signal":1}"#,
    ] {
        served
            .send("PATCH", "/patches/fix", body.as_bytes())
            .refused(Kind::BadRequest);
    }
    assert_eq!(
        served.logged(),
        [
            "apply 8 PerTask",
            "signal fix after 0ns",
            "signal fix after 1.5s"
        ]
    );
}

#[test]
fn a_mode_is_requested_and_a_transition_is_cancelled_or_forced() {
    let served = Served::new(FakeGuest::stuck(), Limits::default());
    let started = served.send("POST", "/patches?mode=stop-machine", ELF);
    assert_eq!(started.status, 201, "{started:?}");
    for body in [
        r#"{"force":true}"#,
        r#"{"enabled":false,"mode":"auto"}"#,
        r#"{"cancel":true}"#,
    ] {
        let answer = served.send("PATCH", "/patches/fix", body.as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    for body in [
        r#"{"cancel":false}"#,
        r#"{"force":true,"cancel":true}"#,
        r#"{"mode":"auto"}"#,
        r#"{"enabled":false,"mode":"all"}"#,
    ] {
        served
            .send("PATCH", "/patches/fix", body.as_bytes())
            .refused(Kind::BadRequest);
    }
    for query in ["mode=all", "mood=auto"] {
        served
            .send("POST", &format!("/patches?{query}"), ELF)
            .refused(Kind::BadRequest);
    }
    assert_eq!(
        served.logged(),
        [
            "apply 8 StopMachine",
            "force fix",
            "revert fix Auto",
            "cancel fix"
        ]
    );
}

#[test]
fn a_patch_is_found_with_dashes_for_underscores() {
    let served = Served::plain();
    let applied = served.send(
        "POST",
        "/patches?wait_ms=20000",
        &module("livepatch_sample"),
    );
    assert!(applied.head.contains("location: /patches/livepatch_sample"));
    for name in ["livepatch_sample", "livepatch-sample"] {
        let patch = served.send("GET", &format!("/patches/{name}"), b"").json();
        assert_eq!(patch["name"], "livepatch_sample", "{name}");
    }
    let path = "/patches/livepatch-sample?wait_ms=20000";
    let reverted = served.send("PATCH", path, br#"{"enabled":false}"#);
    assert_eq!(reverted.json()["phase"], "reverted");
    assert_eq!(
        served.logged(),
        ["apply 21 PerTask", "revert livepatch_sample PerTask"]
    );
    for name in [
        "livepatch_sample.ko",
        "livepatch.sample",
        "LIVEPATCH_SAMPLE",
    ] {
        served
            .send("GET", &format!("/patches/{name}"), b"")
            .refused(Kind::NotFound);
    }
}

#[test]
fn a_core_is_requested_by_its_path() {
    let served = Served::plain();
    let made = served.send("POST", "/dumps", br#"{"path":"/cores/a"}"#);
    assert_eq!(made.status, 201, "{made:?}");
    assert_eq!(
        made.json(),
        json!({"path": "/cores/a", "bytes": 3 << 20, "paused_us": 1500})
    );
    for body in [
        "",
        "{}",
        r#"{"path":7}"#,
        r#"{"path":"/a","compress":true}"#,
    ] {
        served
            .send("POST", "/dumps", body.as_bytes())
            .refused(Kind::BadRequest);
    }
    assert_eq!(served.logged(), ["dump /cores/a"]);
}

fn wait_for_phase(served: &Served, phase: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let patch = served.send("GET", "/patches/fix", b"").json();
        if patch["phase"] == phase {
            return;
        }
        assert!(Instant::now() < deadline, "still {patch}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn malformed_requests_are_refused_with_a_reason() {
    let served = Served::plain();
    served
        .send("POST", "/patches", b"#!/bin/sh")
        .refused(Kind::BadModule);
    served
        .send("GET", "/patches/none", b"")
        .refused(Kind::NotFound);
    served
        .send("PATCH", "/patches/none", br#"{"enabled":false}"#)
        .refused(Kind::NotFound);
    served.send("GET", "/", b"").refused(Kind::NotFound);
    served.send("GET", "/tasks/1", b"").refused(Kind::NotFound);
    served
        .send("PUT", "/vm", b"")
        .refused(Kind::MethodNotAllowed);
    for body in [
        "",
        "paused",
        "{",
        r#"{"state":"asleep"}"#,
        r#"{"state":"paused","force":true}"#,
        "[1]",
        "\u{0}",
    ] {
        served
            .send("PATCH", "/vm", body.as_bytes())
            .refused(Kind::BadRequest);
    }
    assert_eq!(served.logged(), ["apply 9 PerTask"]);
    let form = "POST /patches HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                Content-Type: application/x-www-form-urlencoded\r\n\
                Content-Length: 4\r\n\r\n\x7fELF";
    served.raw(form.as_bytes()).refused(Kind::BadRequest);
}

#[test]
fn bodies_are_limited() {
    let served = Served::plain();
    let long = vec![b' '; 70 << 10];
    served.send("PATCH", "/vm", &long).refused(Kind::TooLarge);
    // The limit holds whether the length is announced or not; an announced one is refused at once.
    let head = format!(
        "POST /patches HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        MAX_MODULE + 1
    );
    served.raw(head.as_bytes()).refused(Kind::TooLarge);
    let chunked =
        "PATCH /vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut bytes = chunked.as_bytes().to_vec();
    for _ in 0..20 {
        bytes.extend_from_slice(b"1000\r\n");
        bytes.extend_from_slice(&[b' '; 0x1000]);
        bytes.extend_from_slice(b"\r\n");
    }
    served.raw(&bytes).refused(Kind::TooLarge);
    assert!(served.logged().is_empty());
}

/// The head of a request with a body of this length.
fn head(method: &str, path: &str, kind: &str, len: usize) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n\
         Content-Length: {len}\r\n\r\n"
    )
}

/// Sends all of a long request, as a client does that reads no answer before, and returns the
/// answer.
fn sent_to_the_end(served: &Served, head: &str, len: usize) -> Answer {
    let mut stream = served.connect();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&vec![b' '; len]).unwrap();
    Answer::read(&mut stream)
}

#[test]
fn a_refused_body_can_be_sent_to_its_end_and_the_answer_read() {
    let served = Served::plain();
    let module = "application/octet-stream";
    let slots: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = served.connect();
            let head = head("POST", "/checks", module, 1000);
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    thread::sleep(Duration::from_millis(100));
    for len in [72 << 10, 300 << 10, 8 << 20] {
        for (method, path, kind, refusal) in [
            ("POST", "/checks", module, Kind::Unavailable),
            ("POST", "/patches", module, Kind::Unavailable),
            ("POST", "/patches", "text/plain", Kind::BadRequest),
            ("POST", "/patches?mode=all", module, Kind::BadRequest),
            ("POST", "/nowhere", module, Kind::NotFound),
            ("PUT", "/vm", module, Kind::MethodNotAllowed),
            ("PATCH", "/vm", "application/json", Kind::TooLarge),
        ] {
            let head = head(method, path, kind, len);
            sent_to_the_end(&served, &head, len).refused(refusal);
        }
    }
    drop(slots);
    thread::sleep(Duration::from_millis(100));
    let len = MAX_MODULE + 1;
    let head = head("POST", "/patches", module, len);
    sent_to_the_end(&served, &head, len).refused(Kind::TooLarge);
    assert!(served.logged().is_empty());
}

#[test]
fn a_client_that_sends_on_and_on_after_its_answer_is_disconnected() {
    let served = Served::plain();
    let mut stream = served.connect();
    let head = head("POST", "/nowhere", "text/plain", usize::MAX >> 1);
    stream.write_all(head.as_bytes()).unwrap();
    let started = Instant::now();
    while stream.write_all(&[b' '; 1 << 16]).is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10));
    }
    Answer::read(&mut stream).refused(Kind::NotFound);
}

#[test]
fn media_types_have_no_case_and_may_have_parameters() {
    let served = Served::plain();
    let answer = |kind: &str| {
        let mut request = head("POST", "/checks", kind, ELF.len());
        request.insert_str(request.len() - 2, "Connection: close\r\n");
        served.raw(&[request.as_bytes(), ELF].concat())
    };
    for kind in [
        "application/octet-stream",
        "Application/Octet-Stream",
        "APPLICATION/OCTET-STREAM; charset=binary",
        "application/octet-stream;name=fix.ko",
        "application/octet-stream ; a=b; c=d",
    ] {
        assert_eq!(answer(kind).status, 200, "{kind}");
    }
    for kind in [
        "application/json",
        "application/octet-streams",
        "multipart/form-data; boundary=application/octet-stream",
        "; application/octet-stream",
    ] {
        answer(kind).refused(Kind::BadRequest);
    }
}

#[test]
fn heads_are_limited() {
    let served = Served::plain();
    let many = format!(
        "GET /vm HTTP/1.1\r\nHost: x\r\n{}\r\n",
        "A: b\r\n".repeat(100)
    );
    assert_eq!(served.raw(many.as_bytes()).status, 431);
    let long = format!(
        "GET /vm HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n",
        "b".repeat(32 << 10)
    );
    assert_eq!(served.raw(long.as_bytes()).status, 431);
    let nonsense = served.raw(b"\x16\x03\x01 hello\r\n\r\n");
    assert_eq!(nonsense.status, 400);
    assert_eq!(served.send("GET", "/version", b"").status, 200);
}

#[test]
fn slow_clients_are_disconnected() {
    let limits = Limits {
        head: Duration::from_millis(100),
        body: Duration::from_millis(100),
        ..Limits::default()
    };
    let served = Served::new(FakeGuest::default(), limits);
    let mut silent = served.connect();
    assert_eq!(
        silent.read(&mut [0; 16]).unwrap_or(0),
        0,
        "closed without an answer"
    );
    let mut half = served.connect();
    half.write_all(b"GET /vm HT").unwrap();
    let mut rest = Vec::new();
    let _ = half.read_to_end(&mut rest);
    let head = b"PATCH /vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99\r\n\r\n{";
    served.raw(head).refused(Kind::RequestTimeout);
    assert_eq!(served.send("GET", "/version", b"").status, 200);
}

#[test]
fn clients_that_disconnect_do_no_harm() {
    let served = Served::plain();
    for cut in [0, 10, 60, 80] {
        let mut stream = served.connect();
        let request = b"POST /patches HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n\
                        \x7fELF and then nothing more";
        stream.write_all(&request[..cut]).unwrap();
        drop(stream);
    }
    let half_closed = served.connect();
    half_closed.shutdown(Shutdown::Write).unwrap();
    drop(half_closed);
    assert_eq!(served.send("GET", "/vm", b"").status, 200);
    assert!(served.logged().is_empty());
}

#[test]
fn an_operation_whose_client_has_disconnected_is_not_run() {
    let guest = FakeGuest::slow(Duration::from_millis(300));
    let served = Served::new(guest, Limits::default());
    let mut busy = served.connect();
    busy.write_all(b"GET /tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    thread::sleep(Duration::from_millis(100));
    let mut leaver = served.connect();
    leaver
        .write_all(b"DELETE /vm HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    thread::sleep(Duration::from_millis(50));
    drop(leaver);
    let mut answer = Vec::new();
    busy.read_to_end(&mut answer).unwrap();
    assert_eq!(served.send("GET", "/vm", b"").status, 200);
    assert_eq!(served.logged(), ["tasks"]);
}

#[test]
fn many_clients_are_served_or_answered_with_unavailable() {
    let guest = FakeGuest::slow(Duration::from_millis(20));
    let served = Served::new(guest, Limits::default());
    let statuses: Vec<u16> = thread::scope(|scope| {
        let clients: Vec<_> = (0..60)
            .map(|_| scope.spawn(|| served.send("GET", "/tasks", b"").status))
            .collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    assert!(
        statuses.iter().all(|s| [200, 503].contains(s)),
        "{statuses:?}"
    );
    let granted = statuses.iter().filter(|s| **s == 200).count();
    assert_eq!(granted, served.logged().len());
    assert!(granted >= 20, "{granted}");
}

#[test]
fn a_transition_continues_under_a_stream_of_requests() {
    let served = Served::plain();
    served.send("POST", "/patches", ELF);
    // wait_for_phase itself is such a stream; here are more.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(served.send("GET", "/vm", b"").status, 200);
                }
            });
        }
        wait_for_phase(&served, "applied");
    });
}

#[test]
fn one_connection_carries_many_requests() {
    let served = Served::plain();
    let mut stream = served.connect();
    let mut seen = String::new();
    for _ in 0..3 {
        stream
            .write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut buffer = [0; 4096];
        let n = stream.read(&mut buffer).unwrap();
        seen.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    assert_eq!(seen.matches("HTTP/1.1 200").count(), 3);
    assert_eq!(seen.matches(env!("CARGO_PKG_VERSION")).count(), 3);
}

#[test]
fn the_socket_is_removed_when_the_server_ends() {
    let mut served = Served::plain();
    let mut idle = served.connect();
    let stopping = Instant::now();
    served.server = None;
    assert!(stopping.elapsed() < Duration::from_secs(5));
    assert!(!served.socket.exists());
    assert!(UnixStream::connect(&served.socket).is_err());
    assert_eq!(idle.read(&mut [0; 16]).unwrap_or(0), 0);
}

#[test]
fn answers_in_progress_are_finished_when_the_server_ends() {
    let guest = FakeGuest::slow(Duration::from_millis(200));
    let mut served = Served::new(guest, Limits::default());
    let mut stream = served.connect();
    stream
        .write_all(b"GET /tasks HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    thread::sleep(Duration::from_millis(50));
    served.server = None;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn an_operation_that_takes_too_long_is_a_timeout() {
    let guest = FakeGuest::slow(Duration::from_millis(400));
    let limits = Limits {
        answer: Duration::from_millis(50),
        ..Limits::default()
    };
    let served = Served::new(guest, limits);
    served.send("GET", "/tasks", b"").refused(Kind::Timeout);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(served.send("GET", "/vm", b"").status, 200);
}

#[test]
fn metrics_are_prometheus_text() {
    let served = Served::plain();
    let page = served.send("GET", "/metrics", b"");
    assert!(page.head.contains("text/plain; version=0.0.4"));
    assert!(
        page.body.contains("\noutpatch_pauses_total 3\n"),
        "{}",
        page.body
    );
    assert!(
        page.body
            .contains("\noutpatch_pause_seconds_total 1.500000\n")
    );
    for (bound, count) in [
        ("0.000050", 1),
        ("0.000100", 2),
        ("0.250000", 2),
        ("+Inf", 3),
    ] {
        let line = format!("\noutpatch_pause_seconds_bucket{{le=\"{bound}\"}} {count}\n");
        assert!(page.body.contains(&line), "{}", page.body);
    }
    for line in page.body.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.split_once(' ').unwrap();
        assert!(name.starts_with("outpatch_"), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn every_route_of_the_table_is_served() {
    let served = Served::plain();
    for route in ROUTES {
        let path = route.path.replace("{pid}", "1").replace("{name}", "fix");
        let answer = served.send(route.method.as_str(), &path, b"");
        let refused = [404, 405].contains(&answer.status);
        // Without a patch the route itself refuses, and names the patch.
        assert!(
            !refused || answer.body.contains("fix"),
            "{route:?}: {answer:?}"
        );
    }
}
