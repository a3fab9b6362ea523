//! Requests that are malformed, too large or refused before their end.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use crate::api::problem::Kind;
use crate::api::routes::MAX_MODULE;
use crate::api::testing::{Answer, ELF, Served};

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
