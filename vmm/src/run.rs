//! Runs a guest from start to end: starts what [`build`] has built, serves
//! its console until it ends, and takes it down in order, whichever way it ends.
//!
//! This module knows the order of starting and of taking down, and what ends a guest; it must not
//! know what a machine consists of (that is `crate::builder`).

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::builder::{build, duplicate_event, duplicate_stream};
use crate::config::VmConfig;
use crate::console::output::Output;
use crate::console::stdin::Stdin;
use crate::console::terminal::RawTerminal;
use crate::error::RunError;
use crate::signals;
use crate::vm::handle::VmHandle;
use crate::vm::vcpu::{ExitReason, ExitedVcpu};

/// How long the last output may take to be written when the user or a signal ends the guest. When
/// the guest ended by itself, the wait has no limit: its last output is often the reason.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

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
    let built = build(config)?;
    let attached = before_start(&VmHandle::new(Arc::clone(&built.shared)))
        .map_err(|e| RunError::BeforeStart(e.into()))?;

    let signal = signals::catch().map_err(|e| RunError::Host("signal handling", e))?;
    let stdin = Stdin::new(
        duplicate_stream(io::stdin())?,
        built.com1,
        built.input_taken,
        duplicate_event(&built.stop)?,
    );
    let outcome = Rc::new(RefCell::new(None));
    let events = ExitEvents {
        exits: built.exits,
        exit_event: built.exit_event,
        stop: built.stop,
        signal,
        outcome: Rc::clone(&outcome),
    };
    let terminal =
        RawTerminal::enter(io::stdin()).map_err(|e| RunError::Host("the terminal", e))?;
    built.shared.vcpus.resume()?;
    let outcome = serve(stdin, events, &outcome);
    built.shared.vcpus.end();
    drop(attached);
    let limited = matches!(
        outcome,
        Ok(RunOutcome::Exit(ExitKind::Stopped | ExitKind::Signal(_)))
    );
    let written = built
        .output
        .drain(limited.then(|| Instant::now() + LAST_OUTPUT));
    drop(terminal);
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

/// Runs the event loop until `outcome` is set.
fn serve(
    stdin: Stdin<Output>,
    exit_events: ExitEvents,
    outcome: &RefCell<Option<RunOutcome>>,
) -> Result<RunOutcome, RunError> {
    let mut events =
        EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(RunError::EventLoop)?;
    events.add_subscriber(Box::new(exit_events));
    events.add_subscriber(Box::new(stdin));
    loop {
        events.run().map_err(RunError::EventLoop)?;
        if let Some(outcome) = outcome.borrow_mut().take() {
            return Ok(outcome);
        }
    }
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
        let mut first = self.outcome.borrow_mut();
        if first.is_none() {
            *first = outcome;
        }
    }
}
