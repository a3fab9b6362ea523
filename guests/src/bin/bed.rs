//! `bed`: run a command, or a shell, where a KVM serves stock kernels.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

use clap::{Args, Parser, Subcommand};
use guests::bed::{Bed, BedError, Probe};

/// Runs commands where a KVM serves stock kernels: right here, or in a nested machine with this machine's files.
#[derive(Parser)]
#[command(name = "bed", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say whether this host's KVM serves stock kernels, and why
    Probe,
    /// Fetch and build all that the bed needs
    Prepare,
    /// Run a command; its output, input and status are the command's
    Run {
        #[command(flatten)]
        options: Options,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// A shell
    Shell {
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Args)]
struct Options {
    /// A folder that may be written for real (can be given many times); all else is read-only or goes with the bed
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// CPUs of a nested bed; with more than one it may die under its guests
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory of a nested bed, in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory: u32,
    /// Stop the command after so many seconds
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,
    /// A nested bed even where the host's KVM serves
    #[arg(long)]
    nested: bool,
    /// Say how long the bed took to start
    #[arg(long, short)]
    verbose: bool,
}

/// As a shell reports a command that it could not run.
const NOT_RUN: u8 = 125;

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Probe => {
            let probe = Probe::detect();
            println!("{probe}");
            return ExitCode::SUCCESS;
        }
        Verb::Prepare => Bed::new().prepare().map(|()| ExitStatus::default()),
        Verb::Run { options, command } => {
            let (program, arguments) = command
                .split_first()
                .map_or(("true", [].as_slice()), |(p, a)| (p, a));
            options.bed().run(Command::new(program).args(arguments))
        }
        Verb::Shell { options } => {
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
