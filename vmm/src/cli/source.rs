//! Where a guest is read from: a running one through its VMM, or a core file.
//!
//! Commands that show tasks, stacks and symbols need not know which of the two it is.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use patcher::CheckReport;
use vmm::api::types::{Symbol, Task, TaskStack};
use vmm::client::Client;

use crate::cli::core_guest::CoreGuest;
use crate::cli::error::CommandError;
use crate::cli::module::{READ_TIMEOUT, read_module};

/// Which guest to read, and how to print.
#[derive(Debug, Args)]
struct Given {
    /// The control socket of the VMM, as given to `outpatch run --socket`.
    #[arg(
        long,
        value_name = "PATH",
        env = "OUTPATCH_SOCKET",
        required_unless_present = "core"
    )]
    socket: Option<PathBuf>,
    /// Read a core file instead of a running guest: from `outpatch dump`, or from QEMU's
    /// dump-guest-memory.
    #[arg(long, value_name = "FILE")]
    core: Option<PathBuf>,
    /// Print the API's JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// The arguments, of which one names the guest.
#[derive(Debug)]
pub struct Source(Given);

/// A guest that can be read.
#[derive(Debug)]
pub enum GuestSource {
    /// It runs, and its VMM answers.
    Live(Client),
    /// It is in a core file.
    Core(Box<CoreGuest>),
}

impl Source {
    /// Opens the core file, or prepares a client of the VMM.
    ///
    /// # Errors
    /// When the core file cannot be read.
    pub fn open(&self) -> Result<GuestSource, CommandError> {
        match (&self.0.core, &self.0.socket) {
            (Some(core), _) => Ok(GuestSource::Core(Box::new(CoreGuest::open(core)?))),
            (None, Some(socket)) => Ok(GuestSource::Live(Client::new(socket)?)),
            (None, None) => Err(CommandError::InvalidState(
                "no guest given: use --socket or --core".to_owned(),
            )),
        }
    }

    /// Whether to print JSON instead of text.
    pub fn json(&self) -> bool {
        self.0.json
    }
}

impl GuestSource {
    /// All tasks of the guest.
    pub fn tasks(&mut self) -> Result<Vec<Task>, CommandError> {
        match self {
            GuestSource::Live(client) => Ok(client.get("/tasks")?),
            GuestSource::Core(core) => core.tasks(),
        }
    }

    /// One task's stack.
    pub fn stack(&mut self, pid: i32) -> Result<TaskStack, CommandError> {
        match self {
            GuestSource::Live(client) => Ok(client.get(&format!("/tasks/{pid}/stack"))?),
            GuestSource::Core(core) => core.stack(pid),
        }
    }

    /// The stacks of all tasks, at one moment.
    pub fn stacks(&mut self) -> Result<Vec<TaskStack>, CommandError> {
        match self {
            GuestSource::Live(client) => Ok(client.get("/stacks")?),
            GuestSource::Core(core) => core.stacks(),
        }
    }

    /// What applying the module in `file` would do.
    pub fn check(&mut self, file: &Path) -> Result<CheckReport, CommandError> {
        let module = read_module(file, READ_TIMEOUT)?;
        match self {
            GuestSource::Live(client) => {
                let done = client.post_module("/checks", module);
                done.map_err(|source| CommandError::Module {
                    path: file.to_owned(),
                    source,
                })
            }
            GuestSource::Core(core) => core.check(file, &module),
        }
    }

    /// All symbols of the guest's kernel and modules.
    pub fn symbols(&mut self) -> Result<Vec<Symbol>, CommandError> {
        match self {
            GuestSource::Live(client) => Ok(client.get("/symbols")?),
            GuestSource::Core(core) => core.symbols(),
        }
    }
}

/// Implemented by hand for one reason: `--core` conflicts with a `--socket` on the command line,
/// but not with a socket from the environment. A derived conflict does not distinguish the two.
impl FromArgMatches for Source {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Source, clap::Error> {
        let given = Given::from_arg_matches(matches)?;
        let says_socket = matches.value_source("socket") == Some(ValueSource::CommandLine);
        if says_socket && given.core.is_some() {
            let why = "the argument '--core <FILE>' cannot be used with '--socket <PATH>'";
            return Err(clap::Error::raw(ErrorKind::ArgumentConflict, why));
        }
        Ok(Source(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Args for Source {
    fn augment_args(command: Command) -> Command {
        Given::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Given::augment_args_for_update(command)
    }
}
