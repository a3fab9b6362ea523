//! The verbs that talk to a running VMM, and the exit status of each.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use introspect::CoreError;
use patcher::{Mode, PatchError};

use crate::cli::output::Output;
use crate::cli::progress::WatchError;
use crate::cli::source::Source;
use crate::cli::{check, dump, inspect, lifecycle, patches};
use vmm::client::{AskError, Client};

/// Which VMM, and how to print.
#[derive(Debug, Args)]
pub struct Target {
    /// The control socket of the VMM, as given to `outpatch run --socket`.
    #[arg(long, value_name = "PATH", env = "OUTPATCH_SOCKET")]
    socket: PathBuf,
    /// Print the API's JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// How tasks are to move, and how to wait for them.
#[derive(Debug, Args)]
pub struct Waiting {
    /// How tasks move: `per-task`, each when it can; `stop-machine`, all in one pause or not at all; `auto`, all in one pause
    /// if that can be, else per task.
    #[arg(long, value_name = "MODE", value_parser = mode, default_value = "per-task")]
    pub mode: Mode,
    /// Send the fake signal to tasks that have not switched after so long.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub signal_after: Option<Duration>,
    #[command(flatten)]
    pub following: Following,
}

/// How to wait for a transition.
#[derive(Debug, Args)]
pub struct Following {
    /// Return as soon as the transition has begun.
    #[arg(long, conflicts_with = "timeout")]
    pub no_wait: bool,
    /// Stop waiting after so long, with exit status 4; the transition goes on.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub timeout: Option<Duration>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the guest's tasks.
    #[command(after_help = EXIT_STATUSES)]
    Ps {
        #[command(flatten)]
        source: Source,
    },
    /// Show kernel stacks, as /proc/PID/stack would, and whether they can be relied on.
    #[command(after_help = EXIT_STATUSES)]
    Stack {
        /// Thread id; 0: the idle task of CPU 0. Without: every task, of one moment.
        pid: Option<i32>,
        /// Also the scheduler's own frames at the top, which /proc/PID/stack leaves out.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        source: Source,
    },
    /// List the symbols of the guest's kernel and modules, as its /proc/kallsyms does.
    #[command(after_help = EXIT_STATUSES)]
    Symbols {
        #[command(flatten)]
        source: Source,
    },
    /// Say what applying a livepatch module would come to, and who is in its way now; nothing is changed.
    #[command(after_help = EXIT_STATUSES)]
    Check {
        /// The module: the .ko that insmod would take.
        file: PathBuf,
        #[command(flatten)]
        source: Source,
    },
    /// Write a core file of the guest, which stands still meanwhile: for crash, drgn, and the verbs that take --core.
    #[command(after_help = EXIT_STATUSES)]
    Dump {
        /// The file, which must not be there yet.
        file: PathBuf,
        #[command(flatten)]
        target: Target,
    },
    /// Apply a livepatch module to the running guest and wait until every task has switched to it.
    #[command(after_help = EXIT_STATUSES)]
    Apply {
        /// The module: the .ko that insmod would take.
        file: PathBuf,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        target: Target,
    },
    /// Show the VM and its patches, or one patch in full.
    #[command(after_help = EXIT_STATUSES)]
    Status {
        /// The patch.
        name: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Send the fake signal to the tasks that have not switched: system calls that sleep restart, or return EINTR.
    #[command(after_help = EXIT_STATUSES)]
    Signal {
        /// The patch; may be left out when one is in transition.
        name: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Turn the running transition round, whichever way it goes, and wait until every task is back.
    #[command(after_help = EXIT_STATUSES)]
    Cancel {
        /// The patch; may be left out when one is in transition.
        name: Option<String>,
        #[command(flatten)]
        following: Following,
        #[command(flatten)]
        target: Target,
    },
    /// End the running transition by moving every task now, wherever it is: consistency is given up, and the patch's code can
    /// never be removed.
    #[command(after_help = EXIT_STATUSES)]
    Force {
        /// The patch; may be left out when one is in transition.
        name: Option<String>,
        #[command(flatten)]
        following: Following,
        #[command(flatten)]
        target: Target,
    },
    /// Revert a patch and wait until every task has left it.
    #[command(after_help = EXIT_STATUSES)]
    Revert {
        /// The patch; may be left out when there is only one.
        name: Option<String>,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        target: Target,
    },
    /// Stop all vCPUs until `resume`.
    #[command(after_help = EXIT_STATUSES)]
    Pause {
        #[command(flatten)]
        target: Target,
    },
    /// Let the vCPUs run again.
    #[command(after_help = EXIT_STATUSES)]
    Resume {
        #[command(flatten)]
        target: Target,
    },
    /// End the VM at once, as if its power were cut, and wait until it is gone.
    #[command(after_help = EXIT_STATUSES)]
    Stop {
        #[command(flatten)]
        target: Target,
    },
}

/// Exit status when the VMM, or the file given, would not do.
const FAILED: u8 = 1;
/// Exit status when there is no VMM to ask. (2 is for wrong arguments.)
const UNREACHABLE: u8 = 3;
/// Exit status when the transition goes on.
const TIMED_OUT: u8 = 4;

/// What the exit statuses mean, for each verb's `--help`.
const EXIT_STATUSES: &str = "\
Exit status: 0 done; 1 refused or failed; 2 wrong arguments; 3 no VMM answers on the socket; \
4 the transition goes on after --timeout.";

/// Why a verb did not do what it says.
#[derive(Debug, thiserror::Error)]
pub enum VerbError {
    /// The VMM.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The file to apply.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The core file cannot be used.
    #[error("{}: {source}", path.display())]
    Core {
        /// Which.
        path: PathBuf,
        /// Why.
        source: CoreError,
    },
    /// The guest in the core file cannot be read.
    #[error("{}: {source}", path.display())]
    InCore {
        /// Which.
        path: PathBuf,
        /// Why.
        source: PatchError,
    },
    /// The guest was stopped in the middle of something that makes its core unreadable in part, for ever.
    #[error("{}: the guest was stopped in the middle of a change ({what}): take another core of it", path.display())]
    CaughtInCore {
        /// Which.
        path: PathBuf,
        /// What was in the way.
        what: String,
    },
    /// The guest in the core file would not take the module.
    #[error("{} in {}: {source}", file.display(), core.display())]
    NotForCore {
        /// The module.
        file: PathBuf,
        /// The core.
        core: PathBuf,
        /// Why.
        source: PatchError,
    },
    /// The VMM does not take the file.
    #[error("{}: {source}", path.display())]
    Module {
        /// Which.
        path: PathBuf,
        /// The VMM's words.
        source: AskError,
    },
    /// Standard output, or the event queue.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// There is nothing, or too much, to do it to.
    #[error("{0}")]
    InvalidState(String),
    /// The transition goes on.
    #[error("{0}")]
    TimedOut(String),
}

impl From<WatchError> for VerbError {
    fn from(error: WatchError) -> VerbError {
        match error {
            WatchError::Ask(error) => VerbError::Ask(error),
            WatchError::Io(error) => VerbError::Io(error),
        }
    }
}

impl VerbError {
    fn exit_status(&self) -> u8 {
        match self {
            VerbError::Ask(error) | VerbError::Module { source: error, .. }
                if error.is_unreachable() =>
            {
                UNREACHABLE
            }
            VerbError::TimedOut(_) => TIMED_OUT,
            _ => FAILED,
        }
    }
}

/// Does what the verb says; one line on standard error when it cannot.
pub fn run(verb: Verb) -> ExitCode {
    match dispatch(verb) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has seen enough, as `outpatch ps | head` has.
        Err(VerbError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outpatch: {}", super::output::printable(&error.to_string()));
            ExitCode::from(error.exit_status())
        }
    }
}

fn dispatch(verb: Verb) -> Result<(), VerbError> {
    let mut screen = Output::stdout();
    let screen = &mut screen;
    match verb {
        Verb::Ps { source } => inspect::ps(&mut source.open()?, source.json(), screen),
        Verb::Stack { pid, all, source } => {
            let guest = &mut source.open()?;
            match pid {
                Some(pid) => inspect::stack(guest, pid, all, source.json(), screen),
                None => inspect::stacks(guest, all, source.json(), screen),
            }
        }
        Verb::Symbols { source } => inspect::symbols(&mut source.open()?, source.json(), screen),
        Verb::Check { file, source } => {
            check::check(&mut source.open()?, &file, source.json(), screen)
        }
        Verb::Dump { file, target } => dump::dump(&target.connect()?, &file, target.json, screen),
        Verb::Apply {
            file,
            waiting,
            target,
        } => patches::apply(&target.connect()?, &file, &waiting, target.json, screen),
        Verb::Status { name, target } => {
            patches::status(&target.connect()?, name.as_deref(), target.json, screen)
        }
        Verb::Signal { name, target } => {
            patches::signal(&target.connect()?, name.as_deref(), target.json, screen)
        }
        Verb::Cancel {
            name,
            following,
            target,
        } => {
            let connection = target.connect()?;
            patches::cancel(
                &connection,
                name.as_deref(),
                &following,
                target.json,
                screen,
            )
        }
        Verb::Force {
            name,
            following,
            target,
        } => {
            let connection = target.connect()?;
            patches::force(
                &connection,
                name.as_deref(),
                &following,
                target.json,
                screen,
            )
        }
        Verb::Revert {
            name,
            waiting,
            target,
        } => {
            let connection = target.connect()?;
            patches::revert(&connection, name.as_deref(), &waiting, target.json, screen)
        }
        Verb::Pause { target } => lifecycle::pause(&target.connect()?, target.json, screen),
        Verb::Resume { target } => lifecycle::resume(&target.connect()?, target.json, screen),
        Verb::Stop { target } => lifecycle::stop(&target.connect()?, target.json, screen),
    }
}

impl Target {
    fn connect(&self) -> io::Result<Client> {
        Client::new(&self.socket)
    }
}

/// A mode, by its name in the API.
fn mode(text: &str) -> Result<Mode, String> {
    serde_json::from_value(serde_json::Value::from(text))
        .map_err(|_| "choose per-task, stop-machine or auto".to_owned())
}

/// A number of seconds, with a fraction if need be.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
