//! The control socket of a guest, spoken to as a control plane does: HTTP/1.1 and JSON, one connection a request.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);
/// What an answer shall be: at the end of the transition, and with those tasks only that are in its way.
const AT_THE_END: &str = "wait_ms=20000&tasks=waiting";

/// The control socket of one guest.
#[derive(Clone, Debug)]
pub struct Rest(PathBuf);

impl Rest {
    /// Talks to the guest behind `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Rest {
        Rest(socket.to_owned())
    }

    /// Applies a module, and waits for the end of the transition; the patch as it is then.
    ///
    /// # Errors
    /// When it is refused, or the transition takes longer than `limit`.
    pub fn apply(&self, module: &[u8], limit: Duration) -> Result<Value> {
        let resource = format!("/patches?{AT_THE_END}");
        let patch = self.request("POST", &resource, module)?;
        self.wait_complete(patch, limit)
    }

    /// Begins to apply a module; the patch as it is then.
    ///
    /// # Errors
    /// When it is refused.
    pub fn start(&self, module: &[u8]) -> Result<Value> {
        self.request("POST", "/patches", module)
    }

    /// Reverts a patch, and waits for the end of the transition.
    ///
    /// # Errors
    /// When it is refused, or the transition takes longer than `limit`.
    pub fn revert(&self, name: &str, limit: Duration) -> Result<Value> {
        let patch = self.change(name, &json!({"enabled": false}))?;
        self.wait_complete(patch, limit)
    }

    /// Changes a patch, or its transition.
    ///
    /// # Errors
    /// When that is refused.
    pub fn change(&self, name: &str, change: &Value) -> Result<Value> {
        let body = change.to_string();
        self.request("PATCH", &format!("/patches/{name}"), body.as_bytes())
    }

    /// Waits until `patch` is in no transition any more.
    ///
    /// # Errors
    /// When that takes longer than `limit`, with the patch as it is then.
    pub fn wait_complete(&self, mut patch: Value, limit: Duration) -> Result<Value> {
        let since = Instant::now();
        while patch["transition"] == true {
            ensure!(
                since.elapsed() < limit,
                "the transition does not end: {patch}"
            );
            let name = patch["name"].as_str().context("a patch with no name")?;
            let resource = format!("/patches/{name}?{AT_THE_END}");
            patch = self.request("GET", &resource, b"")?;
        }
        Ok(patch)
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.0)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: outpatch\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.starts_with("HTTP/1.1 2"), "{method} {path}: {answer}");
        serde_json::from_str(body).with_context(|| answer.clone())
    }
}
