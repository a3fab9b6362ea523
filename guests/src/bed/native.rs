//! Runs a command directly on this host, with a time limit.
//!
//! It is used where the host's own KVM runs stock kernels. This module knows nothing of the nested
//! bed.

use std::io::{self, Read, Write};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::bed::error::BedError;

/// How often a running command is checked for its end and its time limit.
const POLL: Duration = Duration::from_millis(10);

/// Runs `command` with this process's standard streams.
pub(super) fn run(command: &mut Command, limit: Option<Duration>) -> Result<ExitStatus, BedError> {
    let mut child = command.spawn().map_err(|e| cannot(command, &e))?;
    let Some(limit) = limit else {
        return child.wait().map_err(|e| cannot(command, &e));
    };
    let until = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().map_err(|e| cannot(command, &e))? {
            return Ok(status);
        }
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(BedError::TimedOut(limit));
        }
        thread::sleep(POLL);
    }
}

/// Runs `command` with `input` as its standard input, and collects its output.
pub(super) fn run_with_output(
    command: &mut Command,
    input: &[u8],
    limit: Option<Duration>,
) -> Result<Output, BedError> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| cannot(command, &e))?;
    let (mut stdin, mut out, mut err) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let pid = rustix::process::Pid::from_child(&child);
    let over = AtomicBool::new(false);
    let timed_out = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || stdin.take().map(|mut s| s.write_all(input)));
        let out = scope.spawn(move || read_all(out.as_mut()));
        let err = scope.spawn(move || read_all(err.as_mut()));
        scope.spawn(|| {
            let until = limit.map(|l| Instant::now() + l);
            while !over.load(Ordering::Relaxed) {
                if until.is_some_and(|u| Instant::now() > u) {
                    timed_out.store(true, Ordering::Relaxed);
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    return;
                }
                thread::sleep(POLL);
            }
        });
        let stdout = out.join().unwrap_or_default();
        let stderr = err.join().unwrap_or_default();
        let status = child.wait();
        over.store(true, Ordering::Relaxed);
        match (limit, timed_out.load(Ordering::Relaxed)) {
            (Some(limit), true) => Err(BedError::TimedOut(limit)),
            _ => Ok(Output {
                status: status.map_err(|e| cannot(command, &e))?,
                stdout,
                stderr,
            }),
        }
    })
}

fn read_all(from: Option<&mut impl Read>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(from) = from {
        let _ = from.read_to_end(&mut all);
    }
    all
}

fn cannot(command: &Command, error: &io::Error) -> BedError {
    BedError::Command(format!(
        "{}: {error}",
        command.get_program().to_string_lossy()
    ))
}
