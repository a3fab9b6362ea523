//! A blocking client of one VMM's control socket.
//!
//! This module knows HTTP and the API's types, and nothing of commands. Each request has a
//! connection of its own: a command sends few requests, and notices with the next one that the VMM
//! has ended. The first request of a connection is always `GET /version`, which a VMM answers at
//! once, whatever its guest does: so a VMM that does not serve its socket is noticed in seconds,
//! and one that works on a long operation is not taken for it.

mod stream;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::types;
use crate::client::stream::FullDuplex;

/// How long a VMM may take to accept a connection and to answer what needs no guest.
const SERVED_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for an answer: longer than the server lets an operation take.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The time between two attempts to connect to a socket whose queue of connections is full.
const CONNECT_AGAIN: Duration = Duration::from_millis(20);

/// The longest answer accepted, in bytes: far more than the stacks of all tasks of a large guest.
const MAX_ANSWER: usize = 256 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no file at the socket's path.
    #[error(
        "no VMM at {}: no such socket (is the guest running, and was it started with this \
         --socket?)",
        .0.display()
    )]
    NoSocket(PathBuf),
    /// The socket's file is there, but no process listens on it.
    #[error("no VMM at {}: the socket is there, but its VMM has ended", .0.display())]
    Gone(PathBuf),
    /// The socket cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The VMM ended before it answered, or the process that listens is no VMM.
    #[error("the VMM at {} did not answer: {why}", path.display())]
    NoAnswer {
        /// The socket's path.
        path: PathBuf,
        /// What happened instead of an answer.
        why: String,
    },
    /// The VMM refused the request; the texts are its own.
    #[error("{}; {}", .0.error, .0.detail)]
    Refused(types::Problem),
}

impl ClientError {
    /// Whether no VMM answered, as opposed to one that refused.
    pub fn is_unreachable(&self) -> bool {
        !matches!(self, ClientError::Refused(_))
    }
}

/// The body of a request.
enum Content {
    Empty,
    Json(Vec<u8>),
    Module(Vec<u8>),
}

/// A client of one VMM.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of the VMM whose control socket is at `path`. It connects with each request.
    ///
    /// # Errors
    /// When the operating system gives no event queue.
    pub fn new(path: &Path) -> io::Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let path = path.to_owned();
        Ok(Client { path, runtime })
    }

    /// Sends `GET`.
    pub fn get<T: DeserializeOwned>(&self, resource: &str) -> Result<T, ClientError> {
        self.request(Method::GET, resource, Content::Empty)
    }

    /// Sends `PATCH` with a JSON body.
    pub fn patch<T: DeserializeOwned>(
        &self,
        resource: &str,
        change: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(change).map_err(|e| self.no_answer(e))?;
        self.request(Method::PATCH, resource, Content::Json(body))
    }

    /// Sends `POST` with a JSON body.
    pub fn post<T: DeserializeOwned>(
        &self,
        resource: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.no_answer(e))?;
        self.request(Method::POST, resource, Content::Json(body))
    }

    /// Sends `POST` with the bytes of a module as its body.
    pub fn post_module<T: DeserializeOwned>(
        &self,
        resource: &str,
        module: Vec<u8>,
    ) -> Result<T, ClientError> {
        self.request(Method::POST, resource, Content::Module(module))
    }

    /// Sends `DELETE`.
    pub fn delete<T: DeserializeOwned>(&self, resource: &str) -> Result<T, ClientError> {
        self.request(Method::DELETE, resource, Content::Empty)
    }

    /// Whether the VMM has ended: no process listens on the socket. A VMM that does not answer has
    /// not.
    pub fn has_ended(&self) -> bool {
        let connected = self.runtime.block_on(UnixStream::connect(&self.path));
        let error = connected.err().map(|error| self.cannot_open(error));
        matches!(error, Some(ClientError::NoSocket(_) | ClientError::Gone(_)))
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<T, ClientError> {
        let answer = async {
            let stream = self.connect().await?;
            let process = VmmProcess::of(&stream);
            let mut served = self.served(stream, &process).await?;
            let exchange = self.send(&mut served, method, resource, content);
            match tokio::time::timeout(TIMEOUT, exchange).await {
                Ok(answer) => answer,
                Err(_) => Err(self.silent(TIMEOUT, &process)),
            }
        };
        let (ok, body) = self.runtime.block_on(answer)?;
        if ok {
            serde_json::from_slice(&body)
                .map_err(|e| self.no_answer(format!("its answer is not the expected JSON ({e})")))
        } else {
            let problem = serde_json::from_slice(&body).map_err(|_| {
                self.no_answer("it refused, and its reason is not the expected JSON")
            })?;
            Err(ClientError::Refused(problem))
        }
    }

    /// Connects to the socket. A VMM that does not accept connections lets the queue of its socket
    /// fill up: then this waits, too.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let deadline = Instant::now() + SERVED_TIMEOUT;
        loop {
            match UnixStream::connect(&self.path).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        return Err(self.silent(SERVED_TIMEOUT, &VmmProcess(None)));
                    }
                    tokio::time::sleep(CONNECT_AGAIN).await;
                }
                Err(error) => return Err(self.cannot_open(error)),
            }
        }
    }

    /// A connection whose server answers, as it has answered a first request.
    async fn served(
        &self,
        stream: UnixStream,
        process: &VmmProcess,
    ) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let first = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(FullDuplex(stream)))
                .await
                .map_err(|e| self.no_answer(e))?;
            // It ends with the sender.
            tokio::spawn(connection);
            self.send(&mut sender, Method::GET, "/version", Content::Empty)
                .await?;
            sender.ready().await.map_err(|e| self.no_answer(e))?;
            Ok(sender)
        };
        match tokio::time::timeout(SERVED_TIMEOUT, first).await {
            Ok(sender) => sender,
            Err(_) => Err(self.silent(SERVED_TIMEOUT, process)),
        }
    }

    /// Sends one request; returns whether it succeeded, and the body of the answer.
    async fn send(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<(bool, Bytes), ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(resource)
            .header(HOST, "outpatch");
        let request = match content {
            Content::Empty => request.body(Full::<Bytes>::default()),
            Content::Json(body) => request
                .header(CONTENT_TYPE, "application/json")
                .body(Full::from(Bytes::from(body))),
            Content::Module(body) => request
                .header(CONTENT_TYPE, "application/octet-stream")
                .body(Full::from(Bytes::from(body))),
        };
        let request = request.map_err(|e| self.no_answer(e))?;
        let answer = sender
            .send_request(request)
            .await
            .map_err(|e| self.no_answer(e))?;
        let ok = answer.status().is_success();
        let body = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| match e.downcast_ref::<LengthLimitError>() {
                Some(_) => self.no_answer("its answer is too long"),
                None => self.no_answer(e),
            })?;
        Ok((ok, body.to_bytes()))
    }

    fn cannot_open(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path),
            io::ErrorKind::ConnectionRefused => ClientError::Gone(path),
            _ => ClientError::Open { path, source },
        }
    }

    fn silent(&self, waited: Duration, process: &VmmProcess) -> ClientError {
        self.no_answer(format!("nothing in {} s{process}", waited.as_secs()))
    }

    fn no_answer(&self, why: impl ToString) -> ClientError {
        ClientError::NoAnswer {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
}

/// The process that listens on a socket, as far as it is known.
struct VmmProcess(Option<i32>);

impl VmmProcess {
    fn of(stream: &UnixStream) -> VmmProcess {
        let peer = stream.peer_cred().ok();
        // A process of another pid namespace has pid 0 here.
        VmmProcess(peer.and_then(|peer| peer.pid()).filter(|pid| *pid > 0))
    }
}

/// Continues the sentence "nothing in 10 s".
impl fmt::Display for VmmProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(pid) = self.0 else {
            return Ok(());
        };
        match is_stopped(pid) {
            true => write!(
                f,
                "; its process {pid} is stopped: continue it with `fg` in its shell, or with \
                 `kill -CONT {pid}`"
            ),
            false => write!(f, " from process {pid}"),
        }
    }
}

/// Whether a process is stopped by a signal, such as SIGTTOU or SIGSTOP, or by a debugger.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may have any characters.
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| state.starts_with(['T', 't']))
}

/// The resource of the patch `name`. A character that a module's name cannot have is escaped, so
/// that the name cannot reach another resource.
#[must_use]
pub fn patch_resource(name: &str) -> String {
    let name: String = name
        .bytes()
        .map(|byte| match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'_' | b'-' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("/patches/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_called_stopped() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(
            VmmProcess(Some(pid)).to_string(),
            format!(" from process {pid}")
        );
        let process = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_stopped(pid) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
        let text = VmmProcess(Some(pid)).to_string();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(text.contains("is stopped"), "{text}");
        assert!(text.contains(&format!("kill -CONT {pid}")), "{text}");
        assert_eq!(VmmProcess(None).to_string(), "");
    }

    #[test]
    fn a_name_cannot_leave_its_place_in_the_path() {
        assert_eq!(patch_resource("live-patch_1.2"), "/patches/live-patch_1.2");
        assert_eq!(patch_resource("../vm?x#y"), "/patches/..%2Fvm%3Fx%23y");
    }
}
