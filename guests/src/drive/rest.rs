//! A client of a guest's control socket, like a control plane: HTTP/1.1 and JSON, one connection
//! per request.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// How long a response may take.
const RESPONSE_LIMIT: Duration = Duration::from_secs(60);
/// Query parameters: the response comes when the transition has completed, or after 20 s, and lists
/// only the tasks that block it.
const WAIT_QUERY: &str = "wait_ms=20000&tasks=pending";

/// The control socket of one guest.
#[derive(Clone, Debug)]
pub struct Rest(PathBuf);

impl Rest {
    /// The guest whose control socket is `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Rest {
        Rest(socket.to_owned())
    }

    /// Applies a livepatch module and waits until the transition completes. Returns the patch as
    /// the API reports it then.
    ///
    /// # Errors
    /// When the module is refused, or the transition takes longer than `limit`.
    pub fn apply(&self, module: &[u8], limit: Duration) -> Result<Value> {
        let resource = format!("/patches?{WAIT_QUERY}");
        let patch = self.request("POST", &resource, module)?;
        self.wait_complete(patch, limit)
    }

    /// Starts to apply a livepatch module. Returns the patch as the API reports it then.
    ///
    /// # Errors
    /// When the module is refused.
    pub fn start(&self, module: &[u8]) -> Result<Value> {
        self.request("POST", "/patches", module)
    }

    /// Reverts a patch and waits until the transition completes.
    ///
    /// # Errors
    /// When the request is refused, or the transition takes longer than `limit`.
    pub fn revert(&self, name: &str, limit: Duration) -> Result<Value> {
        let patch = self.change(name, &json!({"enabled": false}))?;
        self.wait_complete(patch, limit)
    }

    /// Changes a patch or its transition with a `PATCH` request.
    ///
    /// # Errors
    /// When the request is refused.
    pub fn change(&self, name: &str, change: &Value) -> Result<Value> {
        let body = change.to_string();
        self.request("PATCH", &format!("/patches/{name}"), body.as_bytes())
    }

    /// Waits until the transition of `patch` completes. Returns the patch as the API reports it
    /// then.
    ///
    /// # Errors
    /// When that takes longer than `limit`. The error has the patch.
    pub fn wait_complete(&self, mut patch: Value, limit: Duration) -> Result<Value> {
        let since = Instant::now();
        while patch["transition"] == true {
            ensure!(
                since.elapsed() < limit,
                "the transition does not complete: {patch}"
            );
            let name = patch["name"].as_str().context("a patch with no name")?;
            let resource = format!("/patches/{name}?{WAIT_QUERY}");
            patch = self.request("GET", &resource, b"")?;
        }
        Ok(patch)
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.0)?;
        stream.set_read_timeout(Some(RESPONSE_LIMIT))?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: outpatch\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat())?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let (head, body) = response.split_once("\r\n\r\n").context("no response")?;
        ensure!(
            head.starts_with("HTTP/1.1 2"),
            "{method} {path}: {response}"
        );
        serde_json::from_str(body).with_context(|| response.clone())
    }
}
