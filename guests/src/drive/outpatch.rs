//! Calls the `outpatch` command line as a user does.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(180);

/// The result of one call of the command line.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The exit status; `None` if a signal ended the program.
    pub status: Option<i32>,
    /// What it printed on standard output.
    pub stdout: String,
    /// What it printed on standard error.
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

/// The error for a call that had to be killed, with what it printed.
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

/// The `outpatch` binary and the control socket of one guest.
#[derive(Clone, Debug)]
pub struct Outpatch {
    binary: PathBuf,
    socket: PathBuf,
}

impl Outpatch {
    /// The binary `binary`, for the guest whose control socket is `socket`.
    #[must_use]
    pub fn new(binary: &Path, socket: &Path) -> Outpatch {
        Outpatch {
            binary: binary.to_owned(),
            socket: socket.to_owned(),
        }
    }

    /// The command `outpatch VERB … --socket PATH`, for the caller to start.
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

    /// Calls `outpatch VERB … --socket PATH`; it may succeed or fail.
    ///
    /// # Errors
    /// When the binary cannot be started or does not end in time. The error has what it printed.
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
            // Fails only if the program has just ended.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let out = match &in_time {
            Ok(out) => out.as_ref(),
            Err(_) => return timed_out(args, &ended),
        };
        out.map(Reply::from)
            .map_err(|error| anyhow::anyhow!("outpatch {args:?}: {error}"))
    }

    /// Calls `outpatch VERB …` with no socket, for verbs that need no running guest. It may succeed
    /// or fail.
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

    /// Calls `outpatch VERB … --json --core CORE`, which must succeed, and parses its output.
    ///
    /// # Errors
    /// When the call fails or does not print JSON.
    pub fn of_core(&self, args: &[&str], core: &str) -> Result<Value> {
        let reply = self.offline(&[args, &["--json", "--core", core]].concat())?;
        ensure!(
            reply.status == Some(0),
            "outpatch {args:?} on a core: {}",
            reply.stderr
        );
        serde_json::from_str(&reply.stdout)
            .with_context(|| format!("outpatch {args:?} printed no JSON"))
    }

    /// Like [`call`](Self::call), for a call that must succeed; returns its standard output.
    ///
    /// # Errors
    /// When the call fails. The error has all that it printed.
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

    /// Like [`ok`](Self::ok) with `--json`; parses the output.
    ///
    /// # Errors
    /// When the call fails or does not print JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut args = args.to_vec();
        args.push("--json");
        let text = self.ok(&args)?;
        serde_json::from_str(&text)
            .with_context(|| format!("outpatch {args:?} printed no JSON: {text}"))
    }

    /// A call that must fail with exactly one line on standard error, which is returned.
    ///
    /// # Errors
    /// When it succeeds, or prints no line or several.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let reply = self.call(args)?;
        one_line_refusal(&format!("{args:?}"), &reply)
    }
}

/// Checks that `reply` is a refusal as users want it, a non-zero status and one clear line, and
/// returns that line. `what` is the call, for messages.
///
/// # Errors
/// When the call succeeded, or printed no line or several.
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
