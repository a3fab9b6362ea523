//! The trait `Control`, all that a client can do to a guest, and the control thread that runs its
//! operations: the only thread that reads and changes the guest, one operation at a time.
//!
//! Between operations it polls a running transition. This module knows nothing of HTTP: operations
//! are closures that arrive through a bounded queue, each with a channel for its answer.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use patcher::{CheckReport, Mode, PatchStatus};
use tokio::sync::{oneshot, watch};

use crate::api::priority::raise_above_vcpus;
use crate::api::problem::{Kind, Problem};
use crate::api::types;

/// The most operations that may be queued.
const QUEUE: usize = 32;

/// How long the control thread sleeps when it has nothing to do.
const IDLE: Duration = Duration::from_secs(3600);

/// What can be done with a guest. [`Controller`](super::controller::Controller) does it to a real
/// one; tests have a fake guest.
pub trait Control: Send + 'static {
    /// The VM and its state.
    fn vm(&mut self) -> types::Vm;
    /// Pauses or resumes the guest; does nothing when it already has that state.
    fn set_state(&mut self, state: types::RequestedState) -> Result<(), Problem>;
    /// Requests the end of the VM, which may come after this returns.
    fn stop(&mut self) -> Result<(), Problem>;
    /// All tasks.
    fn tasks(&mut self) -> Result<Vec<types::Task>, Problem>;
    /// One task's stack.
    fn stack(&mut self, pid: i32) -> Result<types::TaskStack, Problem>;
    /// Every task's stack.
    fn stacks(&mut self) -> Result<Vec<types::TaskStack>, Problem>;
    /// All symbols.
    fn symbols(&mut self) -> Result<Vec<types::Symbol>, Problem>;
    /// Writes a core of the guest to a new file at this absolute path.
    fn dump(&mut self, path: &Path) -> Result<types::Dump, Problem>;
    /// All patches, in the order they were applied in.
    fn patches(&mut self) -> Vec<PatchStatus>;
    /// What applying a livepatch module would do now; changes nothing.
    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem>;
    /// Starts to apply a livepatch module; returns the name of its patch.
    fn apply(&mut self, module: &[u8], mode: Mode) -> Result<String, Problem>;
    /// Starts to revert a patch.
    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem>;
    /// Reverses a patch's running transition.
    fn cancel(&mut self, name: &str) -> Result<(), Problem>;
    /// Completes a patch's running transition by switching every task, whatever it executes.
    fn force(&mut self, name: &str) -> Result<(), Problem>;
    /// Sends the fake signal in a patch's running transition, once `after` has passed since its
    /// start.
    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem>;
    /// Tries to complete a running transition.
    fn poll(&mut self);
    /// When the next poll is due; `None`: no transition runs.
    fn due(&mut self) -> Option<Instant>;
}

type Work = Box<dyn FnOnce(&mut dyn Control) + Send>;

/// A queued operation.
struct Operation {
    run: Work,
    /// Whether it may start, reverse or complete a transition, and so change when the next poll is
    /// due.
    changes: bool,
}

/// The running control thread. Dropping it waits for the current operation, and ends the thread.
#[derive(Debug)]
pub(super) struct ControlThread {
    thread: Option<JoinHandle<()>>,
}

/// The sending end of the queue. The control thread ends when the last mailbox is dropped.
#[derive(Clone)]
pub(super) struct Mailbox {
    operations: SyncSender<Operation>,
    timeout: Duration,
    /// Changes each time a transition ends.
    ends: watch::Receiver<()>,
}

impl ControlThread {
    /// How long the current operation may delay the end of the VM.
    const END_TIMEOUT: Duration = Duration::from_secs(5);

    /// Starts the thread. A client waits at most `timeout` for an operation, its time in the queue
    /// included.
    pub fn start(
        mut control: impl Control,
        timeout: Duration,
    ) -> io::Result<(ControlThread, Mailbox)> {
        let (operations, inbox) = mpsc::sync_channel(QUEUE);
        let (ended, ends) = watch::channel(());
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                raise_above_vcpus();
                work(&mut control, &inbox, &ended);
            })?;
        let thread = ControlThread {
            thread: Some(thread),
        };
        Ok((
            thread,
            Mailbox {
                operations,
                timeout,
                ends,
            },
        ))
    }
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        // An operation that never returns must not keep the VM's process alive: then the thread is
        // left to die with the process.
        let deadline = Instant::now() + Self::END_TIMEOUT;
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        if !thread.is_finished() {
            tracing::warn!("the control thread is still busy and is abandoned");
        } else if thread.join().is_err() {
            tracing::error!("the control thread panicked");
        }
    }
}

/// Runs operations as they arrive, and polls the transition when that is due.
fn work(control: &mut impl Control, inbox: &Receiver<Operation>, ended: &watch::Sender<()>) {
    let mut due: Option<Instant> = None;
    loop {
        let wait = due.map_or(IDLE, |at| at.saturating_duration_since(Instant::now()));
        let changes = match inbox.recv_timeout(wait) {
            Ok(operation) => {
                (operation.run)(control);
                operation.changes
            }
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // Checked after every operation, too: a stream of requests must not starve a due poll.
        let polls = due.is_some_and(|at| at <= Instant::now());
        if polls {
            control.poll();
        }
        if polls || changes {
            due = control.due();
            if due.is_none() {
                ended.send_replace(());
            }
        }
    }
}

impl Mailbox {
    /// Runs an operation that reads the guest on the control thread.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        self.send(false, read).await
    }

    /// Runs an operation that may start or change a transition on the control thread.
    pub async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        self.send(true, change).await
    }

    /// The present status of a patch.
    pub async fn patch(&self, name: String) -> Result<PatchStatus, Problem> {
        self.read(move |control| find(control.patches(), &name))
            .await?
    }

    /// Changes each time a transition ends from now on, including one that a later operation
    /// starts.
    pub fn ends(&self) -> watch::Receiver<()> {
        let mut ends = self.ends.clone();
        ends.mark_unchanged();
        ends
    }

    /// Queues an operation and waits for its result. It is not run when its client has gone before
    /// that.
    async fn send<T: Send + 'static>(
        &self,
        changes: bool,
        operation: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let (reply, answer) = oneshot::channel();
        let run = Box::new(move |control: &mut dyn Control| {
            if !reply.is_closed() {
                // The client may go while it runs; then there is no receiver for the result.
                drop(reply.send(operation(control)));
            }
        });
        let operation = Operation { run, changes };
        self.operations
            .try_send(operation)
            .map_err(|error| match error {
                TrySendError::Full(_) => Problem::new(
                    Kind::Unavailable,
                    "too many requests are queued for the guest",
                    "try again in a second",
                ),
                TrySendError::Disconnected(_) => gone(),
            })?;
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Problem::new(
                Kind::Timeout,
                format!("the guest did not answer in {} s", self.timeout.as_secs()),
                "check the status before trying again: the operation may still complete",
            )),
        }
    }
}

/// The newest patch of a name: one that was reverted and applied again is listed twice. As for
/// modprobe, `-` and `_` are the same.
pub(super) fn find(patches: Vec<PatchStatus>, name: &str) -> Result<PatchStatus, Problem> {
    let wanted = name.replace('-', "_");
    let mut newest_first = patches.into_iter().rev();
    let found = newest_first.find(|patch| patch.name.replace('-', "_") == wanted);
    found.ok_or_else(|| {
        Problem::new(
            Kind::NotFound,
            format!("no patch is named {name:?}"),
            "see GET /patches",
        )
    })
}

fn gone() -> Problem {
    Problem::new(
        Kind::Internal,
        "the VMM's control thread has ended",
        "the guest runs on; see the VMM's own messages, and stop the VM by its console or a signal",
    )
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
