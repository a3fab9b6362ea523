//! The commands that talk to a running VMM, or read a core file: their arguments, and what runs
//! each.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use vmm::api::types::PatchChange;

use crate::cli::args::{Following, PatchName, Target, Waiting};
use crate::cli::error::CommandError;
use crate::cli::output::{Output, printable};
use crate::cli::source::Source;
use crate::cli::{check, dump, inspect, lifecycle, patches, status};

/// A command on a running guest, or on one in a core file.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// List the guest's tasks.
    #[command(after_help = EXIT_STATUSES)]
    Ps {
        #[command(flatten)]
        source: Source,
    },
    /// Show kernel stacks, as /proc/PID/stack would, and whether they can be relied on.
    #[command(after_help = EXIT_STATUSES)]
    Stack {
        /// Thread id; 0: the idle task of CPU 0. Without it: all tasks, at one moment.
        pid: Option<i32>,
        /// Also show the scheduler's own frames at the top, which /proc/PID/stack leaves out.
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
    /// Dry run: check whether a module applies, and list the tasks that would delay it.
    #[command(after_help = EXIT_STATUSES)]
    Check {
        /// The module: the .ko that insmod would take.
        file: PathBuf,
        /// Print all functions, all tasks, and the symbols that the module uses.
        #[arg(short, long)]
        verbose: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Write a core file of the guest, which is paused meanwhile: for crash, drgn, and the commands
    /// that take --core.
    #[command(after_help = EXIT_STATUSES)]
    Dump {
        /// The file, which must not exist.
        file: PathBuf,
        #[command(flatten)]
        target: Target,
    },
    /// Apply a livepatch module to the running guest and wait until every task has switched to it.
    #[command(after_help = EXIT_STATUSES_WITH_TIMEOUT)]
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
        /// Name of the patch, or of its module's file; without it, the VM and all patches.
        name: Option<PatchName>,
        /// Print all functions and all tasks.
        #[arg(short, long)]
        verbose: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Send the fake signal to the tasks that have not switched: sleeping system calls restart, or
    /// return EINTR.
    #[command(after_help = EXIT_STATUSES)]
    Signal {
        /// Name of the patch, or of its module's file; without it, the patch in transition.
        name: Option<PatchName>,
        #[command(flatten)]
        target: Target,
    },
    /// Reverse the running transition and wait for it to complete.
    #[command(after_help = EXIT_STATUSES_WITH_TIMEOUT)]
    Cancel {
        /// Name of the patch, or of its module's file; without it, the patch in transition.
        name: Option<PatchName>,
        #[command(flatten)]
        following: Following,
        #[command(flatten)]
        target: Target,
    },
    /// Complete the running transition by switching every task now, whatever it executes: this
    /// gives up consistency, and the patch's code is never freed.
    #[command(after_help = EXIT_STATUSES_WITH_TIMEOUT)]
    Force {
        /// Name of the patch, or of its module's file; without it, the patch in transition.
        name: Option<PatchName>,
        #[command(flatten)]
        following: Following,
        #[command(flatten)]
        target: Target,
    },
    /// Revert a patch and wait until every task has switched back.
    #[command(after_help = EXIT_STATUSES_WITH_TIMEOUT)]
    Revert {
        /// Name of the patch, or of its module's file; not needed when only one is applied.
        name: Option<PatchName>,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        target: Target,
    },
    /// Pause the vCPUs until `resume`.
    #[command(after_help = EXIT_STATUSES)]
    Pause {
        #[command(flatten)]
        target: Target,
    },
    /// Resume the vCPUs.
    #[command(after_help = EXIT_STATUSES)]
    Resume {
        #[command(flatten)]
        target: Target,
    },
    /// Stop the VM at once, as if its power were cut, and wait until it has ended.
    #[command(after_help = EXIT_STATUSES_OF_STOP)]
    Stop {
        #[command(flatten)]
        target: Target,
    },
}

/// What the exit statuses mean, for each command's `--help`.
const EXIT_STATUSES: &str = "\
Exit status: 0 done; 1 refused or failed; 2 wrong arguments; 3 no VMM answers on the socket.";

/// The same for commands that wait for a transition.
const EXIT_STATUSES_WITH_TIMEOUT: &str = "\
Exit status: 0 done; 1 refused or failed; 2 wrong arguments; 3 no VMM answers on the socket; \
4 the transition still runs after --timeout.";

/// The same for `stop`.
const EXIT_STATUSES_OF_STOP: &str = "\
Exit status: 0 done; 1 refused or failed; 2 wrong arguments; 3 no VMM answers on the socket; \
4 the VMM has not ended 15 s after the request.";

/// Runs a command; prints one line on standard error when it fails.
pub fn run(command: GuestCommand) -> ExitCode {
    match dispatch(command) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe, as in `outpatch ps | head`: that is no failure.
        Err(CommandError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("outpatch: {}", printable(&error.to_string()));
            ExitCode::from(error.exit_status())
        }
    }
}

fn dispatch(command: GuestCommand) -> Result<(), CommandError> {
    let output = &mut Output::stdout();
    match command {
        GuestCommand::Ps { source } => inspect::ps(&mut source.open()?, source.json(), output),
        GuestCommand::Stack { pid, all, source } => {
            let guest = &mut source.open()?;
            match pid {
                Some(pid) => inspect::stack(guest, pid, all, source.json(), output),
                None => inspect::stacks(guest, all, source.json(), output),
            }
        }
        GuestCommand::Symbols { source } => {
            inspect::symbols(&mut source.open()?, source.json(), output)
        }
        GuestCommand::Check {
            file,
            verbose,
            source,
        } => {
            let guest = &mut source.open()?;
            check::check(guest, &file, verbose, source.json(), output)
        }
        GuestCommand::Dump { file, target } => {
            dump::dump(&target.connect()?, &file, target.json, output)
        }
        GuestCommand::Apply {
            file,
            waiting,
            target,
        } => patches::apply(&target.connect()?, &file, &waiting, target.json, output),
        GuestCommand::Status {
            name,
            verbose,
            target,
        } => {
            let client = target.connect()?;
            status::status(&client, name.as_ref(), verbose, target.json, output)
        }
        GuestCommand::Signal { name, target } => {
            let (change, following) = (PatchChange::signal(None), Following::not_waiting());
            change_transition(name, &change, &following, &target, output)
        }
        GuestCommand::Cancel {
            name,
            following,
            target,
        } => change_transition(name, &PatchChange::cancel(), &following, &target, output),
        GuestCommand::Force {
            name,
            following,
            target,
        } => change_transition(name, &PatchChange::force(), &following, &target, output),
        GuestCommand::Revert {
            name,
            waiting,
            target,
        } => {
            let client = target.connect()?;
            patches::revert(&client, name.as_ref(), &waiting, target.json, output)
        }
        GuestCommand::Pause { target } => lifecycle::pause(&target.connect()?, target.json, output),
        GuestCommand::Resume { target } => {
            lifecycle::resume(&target.connect()?, target.json, output)
        }
        GuestCommand::Stop { target } => lifecycle::stop(&target.connect()?, target.json, output),
    }
}

fn change_transition(
    name: Option<PatchName>,
    change: &PatchChange,
    following: &Following,
    target: &Target,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let (client, name) = (target.connect()?, name.as_ref());
    patches::change_transition(&client, name, change, following, target.json, output)
}

#[cfg(test)]
mod tests;
