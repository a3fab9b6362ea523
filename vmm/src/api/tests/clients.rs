//! Clients that are slow, many or disconnect, and the end of the server.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::api::problem::Kind;
use crate::api::server::Limits;
use crate::api::testing::{FakeGuest, Served};

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
