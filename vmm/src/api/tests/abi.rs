//! The routes, their answers and their errors, compared with `docs/ABI`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::abi;
use crate::api::problem::Kind;
use crate::api::routes::ROUTES;
use crate::api::server::Limits;
use crate::api::testing::{ELF, FakeGuest, Served};

const METHODS: [&str; 5] = ["GET ", "POST ", "PUT ", "PATCH ", "DELETE "];

#[test]
fn every_route_is_described_and_every_described_route_exists() {
    let routes = ROUTES.iter().map(|r| format!("{} {}", r.method, r.path));
    abi::assert_described(&METHODS, routes);
}

#[test]
fn every_kind_of_error_is_described_with_its_status() {
    let kinds = Kind::ALL.map(|kind| format!("error {}", kind.word()));
    abi::assert_described(&["error "], kinds);
    let text = abi::describing("error conflict");
    for kind in Kind::ALL {
        let line = text.lines().map(str::trim).find(|line| {
            line.split_whitespace().next() == Some(kind.word()) && !line.starts_with("What")
        });
        let status = line.and_then(|line| line.split_whitespace().nth(1));
        assert_eq!(status, Some(kind.status().as_str()), "{kind:?}");
    }
}

#[test]
fn every_field_of_an_answer_is_described() {
    let mut all = BTreeSet::new();
    // In one guest all tasks switch, in the other none: their reports have different fields.
    // A third one is read with a warning.
    for guest in [FakeGuest::default(), FakeGuest::stuck(), FakeGuest::dead()] {
        let served = Served::new(guest, Limits::default());
        served.send("POST", "/patches?wait_ms=500", ELF);
        for route in ROUTES.iter().filter(|r| r.path != "/metrics") {
            let path = route.path.replace("{pid}", "1").replace("{name}", "fix");
            let body: &[u8] = match (route.method.as_str(), route.path) {
                ("PATCH", "/vm") => br#"{"state":"running"}"#,
                ("PATCH", _) => br#"{"enabled":false}"#,
                ("POST", "/dumps") => br#"{"path":"/guest.core"}"#,
                ("POST", _) => ELF,
                _ => b"",
            };
            let answer = served.send(route.method.as_str(), &path, body);
            assert!((200..300).contains(&answer.status), "{route:?}: {answer:?}");
            let what = format!("{} {}", route.method, route.path);
            let fields = fields(&answer.json());
            all.extend(fields.iter().cloned());
            assert_words(&what, fields);
        }
        let refused = served.send("GET", "/nowhere", b"");
        assert_words("error not-found", fields(&refused.json()));
    }
    for sometimes in ["blocker", "since_ms", "after_ms", "warning"] {
        assert!(all.contains(sometimes), "{sometimes} is in no answer");
    }
}

#[test]
fn every_metric_is_described() {
    let served = Served::plain();
    let page = served.send("GET", "/metrics", b"").body;
    let names = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split([' ', '{']).next())
        .map(str::to_owned);
    assert_words("GET /metrics", names.collect());
}

/// Asserts that the file that describes `what` has each of `words`.
fn assert_words(what: &str, words: BTreeSet<String>) {
    assert!(!words.is_empty(), "{what}");
    let text = abi::describing(what);
    let described: BTreeSet<&str> = text
        .split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .collect();
    for word in &words {
        assert!(described.contains(word.as_str()), "{what}: {word}");
    }
}

/// The names of all fields of a JSON value, at any depth.
fn fields(value: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut rest = vec![value];
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(items) => rest.extend(items),
            Value::Object(map) => {
                names.extend(map.keys().cloned());
                rest.extend(map.values());
            }
            _ => {}
        }
    }
    names
}
