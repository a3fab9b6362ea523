//! A blocking client of one VMM's control socket.
//!
//! This module knows HTTP and the API's types, and nothing of commands. Each request has a
//! connection of its own: a command sends few requests, and notices with the next one that the VMM
//! has ended.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::types;

/// How long to wait for an answer: longer than the server lets an operation take.
const TIMEOUT: Duration = Duration::from_secs(90);

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

    /// Whether a VMM answers.
    pub fn responds(&self) -> bool {
        self.get::<types::Version>("/version").is_ok()
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<T, ClientError> {
        let answer = async {
            let exchange = self.exchange(method, resource, content);
            match tokio::time::timeout(TIMEOUT, exchange).await {
                Ok(answer) => answer,
                Err(_) => Err(self.no_answer(format!("no answer in {} s", TIMEOUT.as_secs()))),
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

    /// Sends one request; returns whether it succeeded, and the body of the answer.
    async fn exchange(
        &self,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<(bool, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| self.cannot_open(source))?;
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
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.no_answer(e))?;
        let connection = tokio::spawn(connection);
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
        connection.abort();
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

    fn no_answer(&self, why: impl ToString) -> ClientError {
        ClientError::NoAnswer {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
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
    fn a_name_cannot_leave_its_place_in_the_path() {
        assert_eq!(patch_resource("live-patch_1.2"), "/patches/live-patch_1.2");
        assert_eq!(patch_resource("../vm?x#y"), "/patches/..%2Fvm%3Fx%23y");
    }
}
