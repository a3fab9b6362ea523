//! One running VMM, asked over its control socket.
//!
//! Blocking, one connection a request: a command asks little and seldom, and a VMM that goes away in between is then noticed
//! at the next question.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::api::types;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Longer than the server's own patience.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The longest answer taken: stacks and tasks of a large guest are far below it.
const ANSWER_LIMIT: usize = 256 << 20;

/// Why a VMM did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No file there.
    #[error("no VMM at {}: no such socket (does the guest run, with this --socket?)", .0.display())]
    NoSocket(PathBuf),
    /// A socket that nobody listens on.
    #[error("no VMM at {}: the socket is there, but its VMM is gone", .0.display())]
    Gone(PathBuf),
    /// Cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM went away, or what listens there is none.
    #[error("the VMM at {} did not answer: {why}", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It refused, in its own words.
    #[error("{}; {}", .0.error, .0.detail)]
    Refused(types::Problem),
}

impl AskError {
    /// Whether there is no VMM to ask.
    pub fn is_unreachable(&self) -> bool {
        !matches!(self, AskError::Refused(_))
    }
}

/// What a request carries.
enum Content {
    Nothing,
    Json(Vec<u8>),
    Module(Vec<u8>),
}

/// A VMM that can be asked.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// Asks the VMM at `path`; nothing happens before the first request.
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

    /// `GET`.
    pub fn get<T: DeserializeOwned>(&self, resource: &str) -> Result<T, AskError> {
        self.ask(Method::GET, resource, Content::Nothing)
    }

    /// `PATCH` with a JSON body.
    pub fn patch<T: DeserializeOwned>(
        &self,
        resource: &str,
        change: &impl Serialize,
    ) -> Result<T, AskError> {
        let body = serde_json::to_vec(change).map_err(|e| self.no_answer(e))?;
        self.ask(Method::PATCH, resource, Content::Json(body))
    }

    /// `POST` with a JSON body.
    pub fn create<T: DeserializeOwned>(
        &self,
        resource: &str,
        new: &impl Serialize,
    ) -> Result<T, AskError> {
        let body = serde_json::to_vec(new).map_err(|e| self.no_answer(e))?;
        self.ask(Method::POST, resource, Content::Json(body))
    }

    /// `POST` of a module's bytes.
    pub fn post<T: DeserializeOwned>(
        &self,
        resource: &str,
        module: Vec<u8>,
    ) -> Result<T, AskError> {
        self.ask(Method::POST, resource, Content::Module(module))
    }

    /// `DELETE`.
    pub fn delete<T: DeserializeOwned>(&self, resource: &str) -> Result<T, AskError> {
        self.ask(Method::DELETE, resource, Content::Nothing)
    }

    /// Whether somebody still answers.
    pub fn is_there(&self) -> bool {
        self.get::<types::Version>("/version").is_ok()
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<T, AskError> {
        let asked = async {
            let asked = self.exchange(method, resource, content);
            match tokio::time::timeout(TIMEOUT, asked).await {
                Ok(answer) => answer,
                Err(_) => Err(self.no_answer(format!("nothing came in {} s", TIMEOUT.as_secs()))),
            }
        };
        let (ok, body) = self.runtime.block_on(asked)?;
        if ok {
            serde_json::from_slice(&body).map_err(|e| {
                self.no_answer(format!("its answer is not one that we understand ({e})"))
            })
        } else {
            let problem = serde_json::from_slice(&body)
                .map_err(|_| self.no_answer("it refused without a reason that we understand"))?;
            Err(AskError::Refused(problem))
        }
    }

    /// One request; whether it was granted, and the answer's body.
    async fn exchange(
        &self,
        method: Method,
        resource: &str,
        content: Content,
    ) -> Result<(bool, Bytes), AskError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| self.cannot_open(source))?;
        let request = Request::builder()
            .method(method)
            .uri(resource)
            .header(HOST, "outpatch");
        let request = match content {
            Content::Nothing => request.body(Full::<Bytes>::default()),
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
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT)
            .collect()
            .await
            .map_err(|e| match e.downcast_ref::<LengthLimitError>() {
                Some(_) => self.no_answer("its answer is too long"),
                None => self.no_answer(e),
            })?;
        connection.abort();
        Ok((ok, body.to_bytes()))
    }

    fn cannot_open(&self, source: io::Error) -> AskError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound => AskError::NoSocket(path),
            io::ErrorKind::ConnectionRefused => AskError::Gone(path),
            _ => AskError::Open { path, source },
        }
    }

    fn no_answer(&self, why: impl ToString) -> AskError {
        AskError::NoAnswer {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
}
