//! `bed`: runs a command or a shell where a KVM runs stock kernels.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

use clap::{Args, Parser, Subcommand};
use guests::bed::{Bed, BedError, Probe};

/// Runs commands where a KVM runs stock kernels: on this host, or in a nested machine with its
/// files.
#[derive(Parser)]
#[command(name = "bed", version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Print whether this host's KVM runs stock kernels, and why
    Probe,
    /// Fetch and build all files that a bed needs
    Prepare,
    /// Run a command, with its input, output and exit status passed through
    Run {
        #[command(flatten)]
        options: Options,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run a shell
    Shell {
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args)]
struct Options {
    /// Folder of the host that the command may write (repeatable); in a nested bed all else is
    /// read-only or discarded with the bed
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Number of CPUs of a nested bed; with more than one, it or its guests may die
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory of a nested bed, in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory: u32,
    /// Stop the command after this many seconds
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,
    /// Use a nested bed even if the host's KVM runs stock kernels
    #[arg(long)]
    nested: bool,
    /// Print how long the bed took to start
    #[arg(long, short)]
    verbose: bool,
}

/// Exit status if the command could not be run, like env(1).
const NOT_RUN: u8 = 125;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Action::Probe => {
            println!("{}", Probe::detect());
            return ExitCode::SUCCESS;
        }
        Action::Prepare => Bed::new().prepare().map(|()| ExitStatus::default()),
        Action::Run { options, command } => {
            let (program, arguments) = command
                .split_first()
                .map_or(("true", [].as_slice()), |(p, a)| (p, a));
            options.bed().run(Command::new(program).args(arguments))
        }
        Action::Shell { options } => {
            let shell = std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
            options.bed().run(&mut Command::new(shell))
        }
    };
    end(result)
}

impl Options {
    fn bed(&self) -> Bed {
        let mut bed = Bed::new()
            .cpus(self.cpus)
            .memory_mib(self.memory)
            .verbose(self.verbose);
        for folder in &self.writable {
            bed = bed.writable(folder);
        }
        if let Some(seconds) = self.limit {
            bed = bed.limit(std::time::Duration::from_secs(seconds));
        }
        if self.nested { bed.nested() } else { bed }
    }
}

fn end(result: Result<ExitStatus, BedError>) -> ExitCode {
    match result {
        Ok(status) => {
            let signalled = status.signal().map(|s| 128 + s);
            let code = status.code().or(signalled).unwrap_or(i32::from(NOT_RUN));
            ExitCode::from(u8::try_from(code).unwrap_or(NOT_RUN))
        }
        Err(error) => {
            eprintln!("bed: {error}");
            ExitCode::from(NOT_RUN)
        }
    }
}
