//! The server over a real socket, with a fake guest.

mod abi;
mod clients;
mod patches;
mod requests;

use serde_json::json;

use crate::api::problem::Kind;
use crate::api::routes::ROUTES;
use crate::api::testing::Served;

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
