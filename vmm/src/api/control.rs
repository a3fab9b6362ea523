//! The control thread: the one place from which the guest is looked at and changed, one operation after the other.
//!
//! Between operations it drives a running transition on. It knows nothing of HTTP: operations come as closures through a
//! bounded queue, and each carries its own way back.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use patcher::{CheckReport, Mode, PatchStatus};
use tokio::sync::{oneshot, watch};

use crate::api::priority::go_before_vcpus;
use crate::api::problem::{Kind, Problem};
use crate::api::types;

/// Operations that may wait for their turn.
const QUEUE: usize = 32;

/// The longest that the control thread sleeps when nothing is to be done.
const IDLE: Duration = Duration::from_secs(3600);

/// What can be done with a guest. The VMM's is [`Guest`](super::guest::Guest); tests have their own.
pub trait Control: Send + 'static {
    /// What the VM is.
    fn vm(&mut self) -> types::Vm;
    /// Pauses it or lets it run; nothing happens when it is so already.
    fn set_state(&mut self, state: types::VmState) -> Result<(), Problem>;
    /// Asks the VM to end; it may still be there when this returns.
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
    /// What applying a livepatch module would come to.
    fn check(&mut self, module: &[u8]) -> Result<CheckReport, Problem>;
    /// Begins to apply a livepatch module, and says its name.
    fn apply(&mut self, module: &[u8], mode: Mode) -> Result<String, Problem>;
    /// Begins to revert a patch.
    fn revert(&mut self, name: &str, mode: Mode) -> Result<(), Problem>;
    /// Turns a patch's running transition round.
    fn cancel(&mut self, name: &str) -> Result<(), Problem>;
    /// Moves every task in a patch's running transition, wherever it is.
    fn force(&mut self, name: &str) -> Result<(), Problem>;
    /// Sends the fake signal in a patch's running transition, from so long after its start on.
    fn signal(&mut self, name: &str, after: Duration) -> Result<(), Problem>;
    /// Drives a running transition on.
    fn poll(&mut self);
    /// When that is to be done next; `None`: no transition runs.
    fn due(&mut self) -> Option<Instant>;
}

type Work = Box<dyn FnOnce(&mut dyn Control) + Send>;

/// An operation, as it waits in the queue.
struct Operation {
    run: Work,
    /// It may begin a transition, turn one round or end it: when the next poll is due may be another time.
    changes: bool,
}

/// The running control thread; dropping it lets the operation in hand finish, and ends it.
#[derive(Debug)]
pub(super) struct ControlThread {
    thread: Option<JoinHandle<()>>,
}

/// Where operations are handed in. The control thread ends when the last one is dropped.
#[derive(Clone)]
pub(super) struct Mailbox {
    operations: SyncSender<Operation>,
    patience: Duration,
    /// Changes each time that a transition has ended.
    ends: watch::Receiver<()>,
}

impl ControlThread {
    /// How long the end of the VM may be held up by an operation in hand.
    const END_TIMEOUT: Duration = Duration::from_secs(5);

    /// Starts the thread. An operation may take `patience`, its wait in the queue included, before its client is told that it
    /// takes too long.
    pub fn start(
        mut control: impl Control,
        patience: Duration,
    ) -> io::Result<(ControlThread, Mailbox)> {
        let (operations, inbox) = mpsc::sync_channel(QUEUE);
        let (ended, ends) = watch::channel(());
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                go_before_vcpus();
                work(&mut control, &inbox, &ended);
            })?;
        let thread = ControlThread {
            thread: Some(thread),
        };
        Ok((
            thread,
            Mailbox {
                operations,
                patience,
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
        // An operation that never ends must not keep the VM's process alive: then the thread dies with the process.
        let deadline = Instant::now() + Self::END_TIMEOUT;
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        if !thread.is_finished() {
            tracing::warn!("the control thread is still at work");
        } else if thread.join().is_err() {
            tracing::error!("the control thread panicked");
        }
    }
}

/// Does operations as they come, and polls the transition when it is due.
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
        // Asked after every operation, too: a stream of requests must not starve a poll that is due.
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
    /// Has a look at the guest done on the control thread.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        self.send(false, look).await
    }

    /// Has something done on the control thread that the transition may have to go on from.
    pub async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        self.send(true, change).await
    }

    /// A patch as it is now.
    pub async fn patch(&self, name: String) -> Result<PatchStatus, Problem> {
        self.look(move |control| find(control.patches(), &name))
            .await?
    }

    /// Changes each time that a transition has ended from now on. That of an operation sent later is among them.
    pub fn ends(&self) -> watch::Receiver<()> {
        let mut ends = self.ends.clone();
        ends.mark_unchanged();
        ends
    }

    /// An operation whose client has gone before its turn is not begun.
    async fn send<T: Send + 'static>(
        &self,
        changes: bool,
        operation: impl FnOnce(&mut dyn Control) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let (reply, answer) = oneshot::channel();
        let run = Box::new(move |control: &mut dyn Control| {
            if !reply.is_closed() {
                // The client may go while it is done: nobody then wants the answer.
                drop(reply.send(operation(control)));
            }
        });
        let operation = Operation { run, changes };
        self.operations
            .try_send(operation)
            .map_err(|error| match error {
                TrySendError::Full(_) => Problem::new(
                    Kind::Unavailable,
                    "too many requests wait for the guest",
                    "try again in a second",
                ),
                TrySendError::Disconnected(_) => gone(),
            })?;
        match tokio::time::timeout(self.patience, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Problem::new(
                Kind::Timeout,
                format!("the guest did not answer in {} s", self.patience.as_secs()),
                "ask for the status before trying again: the operation may still be done",
            )),
        }
    }
}

/// The newest patch of a name: one that was reverted and applied again is there twice.
pub(super) fn find(patches: Vec<PatchStatus>, name: &str) -> Result<PatchStatus, Problem> {
    let found = patches.into_iter().rev().find(|p| p.name == name);
    found.ok_or_else(|| {
        Problem::new(
            Kind::NotFound,
            format!("no patch is named {name:?}"),
            "the status lists those there are",
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
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}
