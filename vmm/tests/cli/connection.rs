//! VMMs that are absent, silent, or answer before they have read all.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vmm::api::testing::{TempDir, module};

use crate::{Bench, outpatch, refused};

#[test]
fn a_missing_vmm_is_distinguished_from_one_that_refuses() {
    let bench = Bench::new();
    let absent = bench.dir.path().join("absent.sock");
    let line = refused(&outpatch(&absent, &["ps"]), 3);
    assert!(line.contains("no such socket"), "{line}");
    let stale = bench.dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let line = refused(&outpatch(&stale, &["ps"]), 3);
    assert!(line.contains("its VMM has ended"), "{line}");
    let file = bench.file("file", b"not a socket");
    refused(&outpatch(Path::new(&file), &["ps"]), 3);
    let mute = bench.dir.path().join("mute.sock");
    let listener = UnixListener::bind(&mute).unwrap();
    let hangs_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    refused(&outpatch(&mute, &["status"]), 3);
    hangs_up.join().unwrap();
    let no_socket = Command::new(env!("CARGO_BIN_EXE_outpatch"))
        .arg("ps")
        .env_remove("OUTPATCH_SOCKET")
        .output()
        .unwrap();
    assert_eq!(no_socket.status.code(), Some(2));
}

/// The commands that talk to a VMM, with arguments.
const COMMANDS: [&[&str]; 14] = [
    &["ps"],
    &["stack"],
    &["stack", "1"],
    &["symbols"],
    &["dump", "/nowhere/core"],
    &["status"],
    &["status", "fix"],
    &["signal"],
    &["cancel"],
    &["force"],
    &["revert"],
    &["pause"],
    &["resume"],
    &["stop"],
];

#[test]
fn every_command_gives_up_on_a_vmm_that_does_not_answer() {
    let dir = TempDir::new();
    let module = dir.path().join("fix.ko");
    std::fs::write(&module, module_bytes()).unwrap();
    let module = module.to_str().unwrap();
    let with_module: [&[&str]; 3] = [
        &["check", module],
        &["apply", module],
        &["apply", "--timeout", "1", module],
    ];
    let path = dir.path().join("mute.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    // And one whose queue of connections is full.
    let full = dir.path().join("full.sock");
    let listener = full_listener(&full);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for args in COMMANDS.into_iter().chain(with_module) {
            let path = &path;
            scope.spawn(move || {
                let line = refused(&outpatch(path, args), 3);
                let why = format!("nothing in 10 s from process {}", std::process::id());
                assert!(line.contains(&why), "{args:?}: {line}");
            });
        }
        scope.spawn(|| {
            let line = refused(&outpatch(&full, &["status"]), 3);
            assert!(line.contains("nothing in 10 s"), "{line}");
        });
    });
    assert!(started.elapsed() < Duration::from_secs(40));
    drop(listener);
}

/// A listener that accepts nothing, and with it the connection that fills its queue.
fn full_listener(path: &Path) -> (OwnedFd, UnixStream) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(path).unwrap())
}

/// Reads one request with its body, as far as it has arrived.
fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = [0; 4096];
    let len = stream.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

fn answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn a_vmm_that_hangs_when_it_is_to_stop_has_not_stopped() {
    let dir = TempDir::new();
    let path = dir.path().join("vm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&mut stream);
        stream.write_all(answer("200 OK", "{}").as_bytes()).unwrap();
        assert!(read_request(&mut stream).starts_with("DELETE /vm "));
        let vm = r#"{"state":"running","cpus":1,"memory":0,"pid":42,"kernel":null,
                     "pauses":{"count":0,"total_us":0,"longest_us":0,
                               "histogram":[0,0,0,0,0,0,0,0,0,0,0,0,0],"recent":[]}}"#;
        let accepted = answer("202 Accepted", vm);
        stream.write_all(accepted.as_bytes()).unwrap();
        (listener, stream)
    });
    let line = refused(&outpatch(&path, &["stop"]), 4);
    assert!(line.contains("has not ended after 15 s"), "{line}");
    drop(vmm.join().unwrap());
}

#[test]
fn a_refusal_of_a_large_module_is_printed() {
    let bench = Bench::new();
    let socket = bench.dir.path().join("vm.sock");
    // Both places for uploads are taken by clients that send nothing.
    let slots: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let head = "POST /checks HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    for len in LARGE {
        let file = bench.file("large.ko", &padded(len));
        for command in ["check", "apply"] {
            let line = refused(&bench.run(&[command, &file]), 1);
            assert!(line.contains("too many other modules"), "{len}: {line}");
        }
    }
    drop(slots);
}

/// As a server that closes with the request unread does.
#[test]
fn an_answer_is_read_when_the_request_cannot_be_sent_to_its_end() {
    let dir = TempDir::new();
    let path = dir.path().join("vm.sock");
    let file = dir.path().join("large.ko");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = std::thread::spawn(move || {
        for _ in LARGE {
            let (mut stream, _) = listener.accept().unwrap();
            read_request(&mut stream);
            stream.write_all(answer("200 OK", "{}").as_bytes()).unwrap();
            assert!(read_request(&mut stream).starts_with("POST /patches"));
            let problem = r#"{"kind":"unavailable","error":"not now","detail":"later"}"#;
            let refusal = answer("503 Service Unavailable", problem);
            stream.write_all(refusal.as_bytes()).unwrap();
        }
    });
    for len in LARGE {
        std::fs::write(&file, padded(len)).unwrap();
        let line = refused(&outpatch(&path, &["apply", file.to_str().unwrap()]), 1);
        assert!(line.ends_with("large.ko: not now; later\n"), "{line}");
    }
    vmm.join().unwrap();
}

/// Lengths of modules, from one that fills the socket's buffers on.
const LARGE: [usize; 4] = [72 << 10, 300 << 10, 2 << 20, 16 << 20];

/// A module of this length.
fn padded(len: usize) -> Vec<u8> {
    let mut bytes = module_bytes();
    bytes.resize(len, b' ');
    bytes
}

fn module_bytes() -> Vec<u8> {
    module("fix")
}
