//! Answers that wait for the end of a transition, over a real socket, from a fake guest.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::api::problem::Kind;
use crate::api::server::Limits;
use crate::api::testing::{ELF, FakeGuest, Served};

#[test]
fn an_answer_waits_for_the_end_of_the_transition() {
    let served = Served::plain();
    let applied = served.send("POST", "/patches?wait_ms=20000", ELF);
    assert_eq!(
        (applied.status, &applied.json()["phase"]),
        (201, &json!("applied"))
    );
    let path = "/patches/fix?wait_ms=20000";
    assert_eq!(served.send("GET", path, b"").json()["phase"], "applied");
    let reverted = served.send("PATCH", path, br#"{"enabled":false}"#);
    assert_eq!(reverted.json()["phase"], "reverted");
    served.send("POST", "/patches", ELF);
    assert_eq!(served.send("GET", path, b"").json()["phase"], "applied");
}

#[test]
fn an_answer_has_the_tasks_that_were_requested() {
    let served = Served::plain();
    let tasks = |method, path: &str, body: &[u8]| {
        let patch = served.send(method, path, body).json();
        patch["tasks"].as_array().map(Vec::len)
    };
    let (all, pending) = ("wait_ms=20000", "wait_ms=20000&tasks=pending");
    assert_eq!(tasks("POST", &format!("/patches?{pending}"), ELF), Some(0));
    assert_eq!(tasks("GET", &format!("/patches/fix?{all}"), b""), Some(2));
    assert_eq!(tasks("GET", "/patches/fix?tasks=all", b""), Some(2));
    assert_eq!(tasks("GET", "/patches/fix?tasks=pending", b""), Some(0));
    let served = Served::new(FakeGuest::stuck(), Limits::default());
    let started = served.send("POST", "/patches?tasks=pending", ELF).json();
    assert_eq!(started["tasks"][0]["comm"], "init");
}

#[test]
fn an_answer_waits_no_longer_than_requested() {
    let served = Served::new(FakeGuest::stuck(), Limits::default());
    for wait in ["", "?wait_ms=0", "?wait_ms=30"] {
        let started = served.send("POST", &format!("/patches{wait}"), ELF);
        assert_eq!(
            (started.status, &started.json()["transition"]),
            (201, &json!(true))
        );
        let path = format!("/patches/fix{wait}");
        let patch = served.send("GET", &path, b"");
        assert_eq!(
            (patch.status, &patch.json()["transition"]),
            (200, &json!(true))
        );
    }
    for query in [
        "wait_ms=60001",
        "wait_ms=-1",
        "wait_ms=",
        "wait=1",
        "tasks=switched",
    ] {
        for (method, path) in [
            ("POST", "/patches"),
            ("GET", "/patches/fix"),
            ("PATCH", "/patches/fix"),
        ] {
            let body: &[u8] = if method == "POST" {
                ELF
            } else {
                br#"{"enabled":false}"#
            };
            served
                .send(method, &format!("{path}?{query}"), body)
                .refused(Kind::BadRequest);
        }
    }
    let applied = served.logged();
    assert_eq!(
        applied, ["apply 8 PerTask"; 3],
        "refused before anything is done"
    );
}

#[test]
fn a_waiting_answer_does_not_delay_the_end_of_the_server() {
    let mut served = Served::new(FakeGuest::stuck(), Limits::default());
    let mut waiting = served.connect();
    let head = "POST /patches?wait_ms=60000 HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n";
    waiting.write_all(&[head.as_bytes(), ELF].concat()).unwrap();
    while served.logged().is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    let started = Instant::now();
    served.server = None;
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(waiting.read(&mut [0; 16]).unwrap_or(0), 0);
}
