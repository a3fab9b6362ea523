//! The `outpatch` command line, called as a user calls it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What one call of the command line did.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<&Output> for Reply {
    fn from(out: &Output) -> Reply {
        Reply {
            status: out.status.code(),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }
}

/// The binary, and the control socket of one guest.
#[derive(Clone, Debug)]
pub struct Outpatch {
    binary: PathBuf,
    socket: PathBuf,
}

impl Outpatch {
    /// Talks to the guest behind `socket`.
    #[must_use]
    pub fn new(binary: &Path, socket: &Path) -> Outpatch {
        Outpatch {
            binary: binary.to_owned(),
            socket: socket.to_owned(),
        }
    }

    /// `outpatch VERB … --socket PATH`, to be started by the caller.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .arg("--socket")
            .arg(&self.socket)
            .stdin(Stdio::null());
        command
    }

    /// Calls `outpatch VERB … --socket PATH`, whatever comes of it.
    ///
    /// # Errors
    /// When the binary cannot be started.
    pub fn call(&self, args: &[&str]) -> Result<Reply> {
        let out = self
            .command(args)
            .output()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        Ok(Reply::from(&out))
    }

    /// Calls `outpatch VERB …` with no socket, whatever comes of it: for verbs that need no running guest.
    ///
    /// # Errors
    /// When the binary cannot be started.
    pub fn offline(&self, args: &[&str]) -> Result<Reply> {
        let out = Command::new(&self.binary)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        Ok(Reply::from(&out))
    }

    /// Like [`call`](Self::call), for a call that must succeed.
    ///
    /// # Errors
    /// When it does not, with all that it printed.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let reply = self.call(args)?;
        ensure!(
            reply.status == Some(0),
            "outpatch {args:?} ended with {:?}\n{}{}",
            reply.status,
            reply.stdout,
            reply.stderr
        );
        Ok(reply.stdout)
    }

    /// Like [`ok`](Self::ok) with `--json`, parsed.
    ///
    /// # Errors
    /// When the call fails or does not print JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut with = args.to_vec();
        with.push("--json");
        let text = self.ok(&with)?;
        serde_json::from_str(&text)
            .with_context(|| format!("outpatch {with:?} printed no JSON: {text}"))
    }

    /// A call that must fail with status `status` and exactly one line on standard error, which is returned.
    ///
    /// # Errors
    /// When it does otherwise.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let reply = self.call(args)?;
        one_line_refusal(&format!("{args:?}"), &reply)
    }
}

/// Checks that `reply` is a refusal as users want it: a non-zero status and one clear line.
///
/// # Errors
/// When it is not.
pub fn one_line_refusal(what: &str, reply: &Reply) -> Result<String> {
    ensure!(
        matches!(reply.status, Some(code) if code != 0),
        "{what} should be refused: {reply:?}"
    );
    let lines: Vec<&str> = reply.stderr.lines().collect();
    ensure!(
        lines.len() == 1 && lines[0].len() > 20,
        "{what} should give one clear line: {reply:?}"
    );
    Ok(lines[0].to_owned())
}
