//! Running a command in the bed: what is sent in, what is passed on, and when it is over.

use std::ffi::OsStr;
use std::io::{self, Read, Write, stderr, stdin, stdout};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bed::machine::Machine;
use crate::bed::parts::Parts;
use crate::bed::terminal::{self, Raw};
use crate::bed::wire::{self, FromBed, ToBed};
use crate::bed::{Bed, BedError, INSIDE, LOST, STARTED};
use crate::host::cache::Cache;

/// How long a bed may take to start on a busy machine.
const START: Duration = Duration::from_secs(120);
/// A bed says that it lives every few seconds; after so long without a word it hangs.
const SILENCE: Duration = Duration::from_secs(120);

pub(super) fn here(command: &mut Command, limit: Option<Duration>) -> Result<ExitStatus, BedError> {
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
        thread::sleep(Duration::from_millis(10));
    }
}

pub(super) fn output_here(
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
                thread::sleep(Duration::from_millis(10));
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

pub(super) fn nested_with_our_streams(
    bed: &Bed,
    command: &Command,
) -> Result<ExitStatus, BedError> {
    let terminal = terminal::is_terminal();
    let session = Session::start(bed, command, terminal)?;
    let _raw = terminal.then(Raw::enter);
    session.serve(forward_our_input, |event| match event {
        FromBed::Stdout(bytes) => {
            let mut out = stdout().lock();
            out.write_all(&bytes).and_then(|()| out.flush())
        }
        FromBed::Stderr(bytes) => stderr().write_all(&bytes),
        _ => Ok(()),
    })
}

pub(super) fn nested_output(
    bed: &Bed,
    command: &Command,
    input: &[u8],
) -> Result<Output, BedError> {
    let session = Session::start(bed, command, false)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let feed = |port: &UnixStream, _: &AtomicBool| send_input(port, input);
    let status = session.serve(feed, |event| {
        match event {
            FromBed::Stdout(bytes) => stdout.extend(bytes),
            FromBed::Stderr(bytes) => stderr.extend(bytes),
            _ => {}
        }
        Ok(())
    })?;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

/// A bed with a command in it.
struct Session {
    machine: Machine,
    limit: Option<Duration>,
}

impl Session {
    /// Starts a bed and the command; ours again once the command runs.
    fn start(bed: &Bed, command: &Command, terminal: bool) -> Result<Session, BedError> {
        let parts = Parts::gather(&Cache::open()?)?;
        let spec = spec(bed, command, terminal)?;
        let begin = Instant::now();
        STARTED.fetch_add(1, Ordering::Relaxed);
        let machine = Machine::start(&parts, bed.size)?;
        let mut port = &machine.port;
        let ready = port
            .set_read_timeout(Some(START))
            .and_then(|()| wire::send(&mut port, ToBed::Spec, &spec))
            .and_then(|()| wire::receive(&mut port));
        match ready {
            Ok(FromBed::Ready) => {}
            Ok(FromBed::Failed(reason)) => return Err(BedError::Setup(reason)),
            Ok(_) => return Err(died(machine, "it spoke before it was ready".to_owned())),
            Err(e) => return Err(died(machine, no_word("while starting", &e))),
        }
        if bed.verbose {
            let seconds = begin.elapsed().as_secs_f64();
            eprintln!("bed: nested, started in {seconds:.1} s");
        }
        Ok(Session {
            machine,
            limit: bed.limit,
        })
    }

    /// Passes on what comes until the status comes. `feed` sends the input in a thread of its own and must end soon
    /// after the flag that it is given.
    fn serve(
        self,
        feed: impl FnOnce(&UnixStream, &AtomicBool) -> io::Result<()> + Send,
        mut pass_on: impl FnMut(FromBed) -> io::Result<()>,
    ) -> Result<ExitStatus, BedError> {
        let over = AtomicBool::new(false);
        let mut port = &self.machine.port;
        let until = self.limit.map(|l| Instant::now() + l);
        let end = thread::scope(|scope| {
            scope.spawn(|| feed(&self.machine.port, &over));
            let end = loop {
                let wait = match until.map(|u| u.saturating_duration_since(Instant::now())) {
                    Some(Duration::ZERO) => break End::TimedOut,
                    Some(left) => left.min(SILENCE),
                    None => SILENCE,
                };
                if !self.readable(wait) {
                    if until.is_some_and(|u| Instant::now() >= u) {
                        break End::TimedOut;
                    }
                    break End::Died(format!("not a word from it for {wait:?}"));
                }
                match wire::receive(&mut port) {
                    Ok(FromBed::Status(raw)) => break End::Status(ExitStatus::from_raw(raw)),
                    Ok(FromBed::Failed(reason)) => break End::Died(reason),
                    Ok(event) => {
                        if let Err(e) = pass_on(event) {
                            break End::Stream(e);
                        }
                    }
                    Err(e) => break End::Died(no_word("under the command", &e)),
                }
            };
            over.store(true, Ordering::Relaxed);
            // Frees a feeder that waits for the bed to take its bytes.
            let _ = self.machine.port.shutdown(Shutdown::Both);
            end
        });
        match end {
            End::Status(status) => Ok(status),
            End::TimedOut => Err(BedError::TimedOut(self.limit.unwrap_or_default())),
            End::Stream(e) => Err(BedError::Command(format!(
                "passing on the command's output: {e}"
            ))),
            End::Died(reason) => Err(died(self.machine, reason)),
        }
    }

    fn readable(&self, wait: Duration) -> bool {
        let timeout = Timespec::try_from(wait).ok();
        let mut fds = [PollFd::new(&self.machine.port, PollFlags::IN)];
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return false,
                _ => return true,
            }
        }
    }
}

enum End {
    Status(ExitStatus),
    TimedOut,
    Stream(io::Error),
    Died(String),
}

fn no_word(when: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => {
            format!("it went down {when}")
        }
        io::ErrorKind::WouldBlock => format!("it was not ready after {START:?}"),
        _ => format!("its port failed {when}: {error}"),
    }
}

fn died(machine: Machine, reason: String) -> BedError {
    LOST.fetch_add(1, Ordering::Relaxed);
    let (status, console) = machine.post_mortem();
    let reason = match status {
        Some(status) => format!("{reason}; QEMU: {status}"),
        None => reason,
    };
    BedError::Died { reason, console }
}

/// The command as the bed's first process reads it: `key=value` strings, each ended by a zero byte.
fn spec(bed: &Bed, command: &Command, terminal: bool) -> Result<Vec<u8>, BedError> {
    let mut spec = Vec::new();
    let mut put = |key: &str, value: &OsStr| {
        spec.extend_from_slice(key.as_bytes());
        spec.push(b'=');
        spec.extend_from_slice(value.as_bytes());
        spec.push(0);
    };
    let number = |n: u16| n.to_string();
    if terminal {
        let (rows, columns) = terminal::window().unwrap_or((24, 80));
        put("tty", OsStr::new("1"));
        put("rows", number(rows).as_ref());
        put("cols", number(columns).as_ref());
    }
    let here = std::env::current_dir()
        .map_err(|e| BedError::Command(format!("the current folder: {e}")))?;
    let folder = command
        .get_current_dir()
        .map_or(here.clone(), |d| here.join(d));
    put("cwd", folder.as_os_str());
    for folder in &bed.writable {
        let real = folder
            .canonicalize()
            .map_err(|e| BedError::Command(format!("writable folder {}: {e}", folder.display())))?;
        if !real.is_dir() {
            return Err(BedError::Command(format!(
                "writable folder {} is not a folder",
                folder.display()
            )));
        }
        put("writable", real.as_os_str());
    }
    put("arg", command.get_program());
    for argument in command.get_args() {
        put("arg", argument);
    }
    let mut environment: std::collections::BTreeMap<_, _> = std::env::vars_os().collect();
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => environment.insert(name.to_owned(), value.to_owned()),
            None => environment.remove(name),
        };
    }
    environment.insert(INSIDE.into(), "1".into());
    for (name, value) in environment {
        let mut pair = name;
        pair.push("=");
        pair.push(value);
        put("env", &pair);
    }
    Ok(spec)
}

fn send_input(port: &UnixStream, input: &[u8]) -> io::Result<()> {
    let mut port = port;
    for chunk in input.chunks(16 << 10) {
        wire::send(&mut port, ToBed::Stdin, chunk)?;
    }
    wire::send(&mut port, ToBed::EndOfInput, b"")
}

/// Our own standard input, until it ends or the command does; and our terminal's size when it changes.
fn forward_our_input(port: &UnixStream, over: &AtomicBool) -> io::Result<()> {
    let mut port = port;
    let input = stdin();
    let mut window = terminal::window();
    let mut chunk = [0; 16 << 10];
    while !over.load(Ordering::Relaxed) {
        let now = terminal::window();
        if let Some((rows, columns)) = now.filter(|_| now != window) {
            wire::send(
                &mut port,
                ToBed::Window,
                format!("{rows} {columns}").as_bytes(),
            )?;
            window = now;
        }
        let mut fds = [PollFd::new(&input, PollFlags::IN)];
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        match poll(&mut fds, Some(&wait)) {
            Ok(1..) => {}
            Ok(_) | Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        // Past std's buffer: what it would read ahead is not ours to take.
        let n = rustix::io::read(&input, &mut chunk)?;
        if n == 0 {
            return wire::send(&mut port, ToBed::EndOfInput, b"");
        }
        wire::send(&mut port, ToBed::Stdin, chunk.get(..n).unwrap_or_default())?;
    }
    Ok(())
}
