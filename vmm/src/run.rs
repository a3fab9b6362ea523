//! Runs a guest from start to end: starts what [`build`] has built, serves
//! its console until it ends, and takes it down in order, whichever way it ends.
//!
//! This module knows the order of starting and of taking down, and what ends a guest; it must not
//! know what a machine consists of (that is `crate::builder`).

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::builder::{BuiltVm, build, duplicate_event, duplicate_stream};
use crate::config::VmConfig;
use crate::console::output::Output;
use crate::console::stdin::Stdin;
use crate::console::transmit::Transmit;
use crate::error::RunError;
use crate::signals;
use crate::vm::handle::VmHandle;
use crate::vm::vcpu::{ExitReason, ExitedVcpu};

/// How long the last output may take to be written when the user or a signal ends the guest. When
/// the guest ended by itself, the wait has no limit, as its last output is often the reason; but
/// the user or a signal can end it. Shorter than the time after which `signals` ends the process.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// How often the unlimited wait checks whether the last output is written, in milliseconds.
const LAST_OUTPUT_CHECK: i32 = 20;

/// How a guest ended that did not crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine. A guest is not started again.
    Reset,
    /// The user (Ctrl-A x) or the control socket ended the guest.
    Stopped,
    /// The signal with this number ended the process.
    Signal(i32),
}

/// Runs a guest on our standard input and output until it ends. Blocks the calling thread, which
/// runs the event loop.
///
/// `before_start` is called when the machine is built and before its first vCPU runs. What it
/// returns (a control socket's server, say) is kept until the vCPUs have ended, and then dropped.
///
/// # Errors
/// [`RunError`]: the guest could not be started, or a vCPU cannot continue.
pub fn run_vm<G, E>(
    config: &VmConfig,
    before_start: impl FnOnce(&VmHandle) -> Result<G, E>,
) -> Result<ExitKind, RunError>
where
    E: Into<Box<dyn Error + Send + Sync>>,
{
    // Before the guest is built, so that a signal that comes meanwhile is not lost.
    let signal = signals::event().map_err(signal_error)?;
    let built = build(config)?;
    let attached = before_start(&VmHandle::new(Arc::clone(&built.shared)))
        .map_err(|e| RunError::BeforeStart(e.into()))?;
    run_built(built, duplicate_stream(io::stdin())?, signal, attached)
}

fn signal_error(error: io::Error) -> RunError {
    RunError::Host("signal handling", error)
}

/// Runs `built` until its guest ends, with `stdin` as its console's input. `signal` is written to
/// for each signal that ends the process; `attached` is dropped when the vCPUs have ended.
fn run_built<G>(
    built: BuiltVm,
    stdin: OwnedFd,
    signal: EventFd,
    attached: G,
) -> Result<ExitKind, RunError> {
    let transmit = Transmit::new(Arc::clone(&built.com1), built.output.clone());
    let stdin = Stdin::new(
        stdin,
        built.com1,
        built.input_taken,
        duplicate_event(&built.stop)?,
        signals::continued().map_err(signal_error)?,
    )
    .map_err(|e| RunError::Host("the terminal", e))?;
    if let Some(restore) = stdin.restorer() {
        signals::before_forced_end(restore);
    }
    let first = Rc::new(RefCell::new(None));
    let exit_events = ExitEvents {
        exits: built.exits,
        exit_event: built.exit_event,
        stop: built.stop,
        signal,
        outcome: Rc::clone(&first),
    };
    let mut events = EventLoop::new().map_err(RunError::EventLoop)?;
    events.add_subscriber(Box::new(exit_events));
    events.add_subscriber(Box::new(stdin));
    events.add_subscriber(Box::new(transmit));
    built.shared.vcpus.resume()?;
    let mut outcome = wait_for_end(&mut events, &first);
    built.shared.vcpus.end();
    drop(attached);
    let written = match &outcome {
        Ok(RunOutcome::Exit(ExitKind::PowerOff | ExitKind::Reset) | RunOutcome::Crash(_)) => {
            let interrupted = wait_for_output(&mut events, &first, &built.output)?;
            if let (Some(ExitKind::Signal(signal)), Ok(RunOutcome::Exit(kind))) =
                (interrupted, &mut outcome)
            {
                *kind = ExitKind::Signal(signal);
            }
            interrupted.is_none()
        }
        Ok(RunOutcome::Exit(_)) | Err(_) => built.output.drain(Some(Instant::now() + LAST_OUTPUT)),
    };
    // Restores the terminal.
    drop(events);
    if !written {
        tracing::warn!("standard output is not read: the guest's last output is lost");
    }
    match outcome? {
        RunOutcome::Exit(kind) => Ok(kind),
        RunOutcome::Crash(exited) => Err(RunError::Crash(exited)),
    }
}

/// How the guest ended.
#[derive(Debug)]
enum RunOutcome {
    Exit(ExitKind),
    Crash(Box<ExitedVcpu>),
}

type EventLoop = EventManager<Box<dyn MutEventSubscriber>>;

/// Runs the event loop until the guest ends or is to end.
fn wait_for_end(
    events: &mut EventLoop,
    first: &RefCell<Option<RunOutcome>>,
) -> Result<RunOutcome, RunError> {
    loop {
        events.run().map_err(RunError::EventLoop)?;
        if let Some(outcome) = first.borrow_mut().take() {
            return Ok(outcome);
        }
    }
}

/// Runs the event loop until all of `output` is written. Ctrl-A x and signals still work: the
/// reader may never read. Returns which of them has ended the wait.
fn wait_for_output(
    events: &mut EventLoop,
    first: &RefCell<Option<RunOutcome>>,
    output: &Output,
) -> Result<Option<ExitKind>, RunError> {
    while !output.drain(Some(Instant::now())) {
        events
            .run_with_timeout(LAST_OUTPUT_CHECK)
            .map_err(RunError::EventLoop)?;
        // Other vCPUs may report their end, too: it changes nothing.
        if let Some(RunOutcome::Exit(kind @ (ExitKind::Stopped | ExitKind::Signal(_)))) =
            first.borrow_mut().take()
        {
            return Ok(Some(kind));
        }
    }
    Ok(None)
}

/// All events that end a guest, as a subscriber of the event loop. The first event decides.
#[derive(Debug)]
struct ExitEvents {
    exits: Receiver<ExitedVcpu>,
    exit_event: EventFd,
    stop: EventFd,
    signal: EventFd,
    outcome: Rc<RefCell<Option<RunOutcome>>>,
}

impl MutEventSubscriber for ExitEvents {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [&self.exit_event, &self.stop, &self.signal] {
            if let Err(e) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!("event loop: {e:?}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if self.outcome.borrow().is_some() {
            // Left unread, it is reported again: it may end the wait for the last output.
            return;
        }
        let outcome = if events.fd() == self.exit_event.as_raw_fd() {
            let _ = self.exit_event.read();
            self.exits
                .try_recv()
                .ok()
                .map(|exited| match exited.reason {
                    ExitReason::PowerOff => RunOutcome::Exit(ExitKind::PowerOff),
                    ExitReason::Reset => RunOutcome::Exit(ExitKind::Reset),
                    _ => RunOutcome::Crash(Box::new(exited)),
                })
        } else if events.fd() == self.stop.as_raw_fd() {
            let _ = self.stop.read();
            Some(RunOutcome::Exit(ExitKind::Stopped))
        } else {
            let _ = self.signal.read();
            Some(RunOutcome::Exit(ExitKind::Signal(signals::last())))
        };
        *self.outcome.borrow_mut() = outcome;
    }
}

#[cfg(test)]
mod tests;
