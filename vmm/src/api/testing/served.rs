//! A fake guest behind a real control socket, and a client that sends raw requests to it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::api::problem::Kind;
use crate::api::server::{Limits, Server};
use crate::api::socket::ControlSocket;
use crate::api::testing::{FakeGuest, TempDir};
use crate::api::types;

/// A served fake guest.
pub(crate) struct Served {
    pub server: Option<Server>,
    pub socket: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    _dir: TempDir,
}

impl Served {
    pub fn new(guest: FakeGuest, limits: Limits) -> Served {
        let dir = TempDir::new();
        let socket = dir.path().join("vm.sock");
        let log = guest.log();
        let claimed = ControlSocket::claim(&socket).unwrap();
        let server = Server::start(claimed, guest, limits).unwrap();
        Served {
            server: Some(server),
            socket,
            log,
            _dir: dir,
        }
    }

    pub fn plain() -> Served {
        Served::new(FakeGuest::default(), Limits::default())
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends `bytes` as they are, and reads until the server closes.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Answer::read(&mut stream)
    }

    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    pub fn logged(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// A response, with its head in lower case.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(stream: &mut UnixStream) -> Answer {
        let mut bytes = Vec::new();
        // A connection reset after the response is as good as an end of file.
        if let Err(error) = stream.read_to_end(&mut bytes) {
            assert!(!bytes.is_empty(), "no answer: {error}");
        }
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        Answer {
            status: status.unwrap_or(0),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Asserts that it is an error of this kind, with one-line texts.
    pub fn refused(&self, kind: Kind) {
        assert_eq!(self.status, kind.status().as_u16(), "{self:?}");
        let problem: types::Problem = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem.kind, kind.word());
        assert!(!problem.error.is_empty() && !problem.error.contains('\n'));
        assert!(!problem.detail.is_empty() && !problem.detail.contains('\n'));
    }
}
