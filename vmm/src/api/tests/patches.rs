//! Patches and their transitions.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::api::problem::Kind;
use crate::api::server::Limits;
use crate::api::testing::{ELF, FakeGuest, Served, module};

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
