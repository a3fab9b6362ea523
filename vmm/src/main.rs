//! `outpatch`: starts a guest, or talks to the VMM of a running one.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

#[cfg(test)]
mod abi;
mod cli;

/// Boots stock Linux kernels and patches them from outside, while they run.
#[derive(Debug, Parser)]
#[command(name = "outpatch", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(cli::run::Args),
    #[command(flatten)]
    Guest(cli::commands::GuestCommand),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .with_target(false)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error),
    };
    let result = match cli.command {
        // Not for the other commands, which hold nothing: the default action ends them at once.
        Command::Run(args) => vmm::end_on_signals()
            .context("cannot set up signal handling")
            .and_then(|()| cli::run::run(args)),
        Command::Guest(command) => return cli::commands::run(command),
    };
    result.unwrap_or_else(|error| {
        eprintln!("outpatch: {error:#}");
        ExitCode::FAILURE
    })
}

/// Exit status for wrong arguments.
const USAGE_ERROR: u8 = 2;

/// Prints help or the version as clap has them; otherwise what is wrong with the arguments, in one
/// line as every other error.
fn usage_error(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let line = lines.join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    eprintln!("outpatch: {line} (see --help)");
    ExitCode::from(USAGE_ERROR)
}
