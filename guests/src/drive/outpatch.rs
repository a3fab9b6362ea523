//! The `outpatch` command line, called as a user calls it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// How long a call may take: none of them is meant to wait for ever.
const LIMIT: Duration = Duration::from_secs(180);

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

/// A call that did not end by itself.
fn timed_out(args: &[&str], ended: &mpsc::Receiver<std::io::Result<Output>>) -> Result<Reply> {
    let printed = match ended.recv_timeout(LIMIT) {
        Ok(Ok(out)) => Reply::from(&out),
        _ => bail!("outpatch {args:?} did not end within {LIMIT:?}, and could not be killed"),
    };
    bail!(
        "outpatch {args:?} did not end within {LIMIT:?}\n{}{}",
        printed.stdout,
        printed.stderr
    )
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
    /// When the binary cannot be started, or does not end in time: with all that it printed until then.
    pub fn call(&self, args: &[&str]) -> Result<Reply> {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        let pid = rustix::process::Pid::from_child(&child);
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(child.wait_with_output()));
        let in_time = ended.recv_timeout(LIMIT);
        if in_time.is_err() {
            // It may have ended just now.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let out = match &in_time {
            Ok(out) => out.as_ref(),
            Err(_) => return timed_out(args, &ended),
        };
        out.map(Reply::from)
            .map_err(|error| anyhow::anyhow!("outpatch {args:?}: {error}"))
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

    /// Calls `outpatch VERB … --json --core CORE`, which must succeed.
    ///
    /// # Errors
    /// When it does not, or does not print JSON.
    pub fn of_core(&self, args: &[&str], core: &str) -> Result<Value> {
        let reply = self.offline(&[args, &["--json", "--core", core]].concat())?;
        ensure!(
            reply.status == Some(0),
            "outpatch {args:?} of a core: {}",
            reply.stderr
        );
        serde_json::from_str(&reply.stdout)
            .with_context(|| format!("outpatch {args:?} printed no JSON"))
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
