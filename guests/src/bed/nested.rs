//! Runs a command in a nested bed: sends the command and its input, passes its output on, and
//! decides when it has ended, timed out, or the bed has died.

use std::io::{self, Write, stderr, stdin, stdout};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bed::error::BedError;
use crate::bed::files::BedFiles;
use crate::bed::machine::Machine;
use crate::bed::protocol::{self, FromBed, ToBed};
use crate::bed::terminal::{self, Raw};
use crate::bed::{Bed, command_spec, stats};
use crate::host::cache::Cache;

/// Rows and columns of a terminal whose size is unknown.
const DEFAULT_TERMINAL_SIZE: (u16, u16) = (24, 80);
/// How long a bed may take to start on a busy host.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A bed that sends nothing for this long hangs: it sends at least a heartbeat every few seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// Runs `command` in a new bed with this process's standard streams.
pub(super) fn run(bed: &Bed, command: &Command) -> Result<ExitStatus, BedError> {
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

/// Runs `command` in a new bed with `input` as its standard input, and collects its output.
pub(super) fn run_with_output(
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

/// A nested bed in which a command runs.
struct Session {
    machine: Machine,
    limit: Option<Duration>,
}

impl Session {
    /// Starts a bed and the command in it. Returns once the command is about to run.
    fn start(bed: &Bed, command: &Command, terminal: bool) -> Result<Session, BedError> {
        bed.check()?;
        let files = BedFiles::fetch(&Cache::open()?)?;
        let size = terminal.then(|| terminal::size().unwrap_or(DEFAULT_TERMINAL_SIZE));
        let mut spec = command_spec::encode(command, &bed.writable, size)?;
        let started = Instant::now();
        stats::add_started();
        let machine = Machine::start(&files, bed.size)?;
        command_spec::put_max_files(&mut spec, machine.max_files());
        let mut port = &machine.port;
        let ready = port
            .set_read_timeout(Some(START_LIMIT))
            .and_then(|()| protocol::send(&mut port, ToBed::Spec, &spec))
            .and_then(|()| protocol::receive(&mut port));
        match ready {
            Ok(FromBed::Ready) => {}
            Ok(FromBed::Failed(reason)) => return Err(BedError::Setup(reason)),
            Ok(_) => {
                return Err(died(
                    machine,
                    "it sent something else before it was ready".to_owned(),
                ));
            }
            Err(e) => return Err(died(machine, describe_port_error("while starting", &e))),
        }
        if bed.verbose {
            let seconds = started.elapsed().as_secs_f64();
            eprintln!("bed: nested, started in {seconds:.1} s");
        }
        Ok(Session {
            machine,
            limit: bed.limit,
        })
    }

    /// Passes everything that the bed sends to `pass_on` until it sends the command's status.
    /// `feed` sends the input in a thread of its own, and must return soon after its flag is set.
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
                    Some(Duration::ZERO) => break SessionEnd::TimedOut,
                    Some(left) => left.min(SILENCE_LIMIT),
                    None => SILENCE_LIMIT,
                };
                if !self.readable(wait) {
                    if until.is_some_and(|u| Instant::now() >= u) {
                        break SessionEnd::TimedOut;
                    }
                    break SessionEnd::Died(format!("it sent nothing for {wait:?}"));
                }
                match protocol::receive(&mut port) {
                    Ok(FromBed::Status(raw)) => {
                        break SessionEnd::Status(ExitStatus::from_raw(raw));
                    }
                    Ok(FromBed::Failed(reason)) => break SessionEnd::Died(reason),
                    Ok(event) => {
                        if let Err(e) = pass_on(event) {
                            break SessionEnd::Stream(e);
                        }
                    }
                    Err(e) => {
                        break SessionEnd::Died(describe_port_error("while the command ran", &e));
                    }
                }
            };
            over.store(true, Ordering::Relaxed);
            // Wakes `feed` if it waits for the bed to take its bytes.
            let _ = self.machine.port.shutdown(Shutdown::Both);
            end
        });
        match end {
            SessionEnd::Status(status) => Ok(status),
            SessionEnd::TimedOut => Err(BedError::TimedOut(self.limit.unwrap_or_default())),
            SessionEnd::Stream(e) => Err(BedError::Command(format!(
                "passing on the command's output: {e}"
            ))),
            SessionEnd::Died(reason) => Err(died(self.machine, reason)),
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

enum SessionEnd {
    Status(ExitStatus),
    TimedOut,
    Stream(io::Error),
    Died(String),
}

fn describe_port_error(when: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => {
            format!("it went down {when}")
        }
        io::ErrorKind::WouldBlock => format!("it was not ready after {START_LIMIT:?}"),
        _ => format!("its port failed {when}: {error}"),
    }
}

fn died(machine: Machine, reason: String) -> BedError {
    stats::add_lost();
    let (status, console) = machine.post_mortem();
    let reason = match status {
        Some(status) => format!("{reason}; QEMU: {status}"),
        None => reason,
    };
    BedError::Died { reason, console }
}

fn send_input(port: &UnixStream, input: &[u8]) -> io::Result<()> {
    let mut port = port;
    for chunk in input.chunks(16 << 10) {
        protocol::send(&mut port, ToBed::Stdin, chunk)?;
    }
    protocol::send(&mut port, ToBed::EndOfInput, b"")
}

/// Sends our standard input until it or the command ends, and our terminal's size when it changes.
fn forward_our_input(port: &UnixStream, over: &AtomicBool) -> io::Result<()> {
    let mut port = port;
    let input = stdin();
    let mut size = terminal::size();
    let mut chunk = [0; 16 << 10];
    while !over.load(Ordering::Relaxed) {
        let now = terminal::size();
        if let Some((rows, columns)) = now.filter(|_| now != size) {
            protocol::send(
                &mut port,
                ToBed::TerminalSize,
                format!("{rows} {columns}").as_bytes(),
            )?;
            size = now;
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
        // Not through the standard library, which would read ahead more than is sent.
        let n = rustix::io::read(&input, &mut chunk)?;
        if n == 0 {
            return protocol::send(&mut port, ToBed::EndOfInput, b"");
        }
        protocol::send(&mut port, ToBed::Stdin, chunk.get(..n).unwrap_or_default())?;
    }
    Ok(())
}
