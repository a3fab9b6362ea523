//! `outpatch`: starts guests, and talks to running ones.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[cfg(test)]
mod abi;
mod cli;

/// Boots stock Linux kernels and patches them from outside, while they run.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(cli::run::Args),
    #[command(flatten)]
    Verb(cli::commands::Verb),
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
        Err(error) => return misused(&error),
    };
    let done = match cli.command {
        Command::Run(args) => cli::run::run(args),
        Command::Verb(verb) => return cli::commands::run(verb),
    };
    done.unwrap_or_else(|error| {
        eprintln!("outpatch: {error:#}");
        ExitCode::FAILURE
    })
}

/// Exit status for wrong arguments.
const MISUSED: u8 = 2;

/// Help and the version as they are; what is wrong with the arguments in one line, as every other refusal.
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let text = error.to_string();
    let said: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let said = said.join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    eprintln!("outpatch: {said} (--help tells more)");
    ExitCode::from(MISUSED)
}
