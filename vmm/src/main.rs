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
    Verb(cli::verbs::Verb),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .with_target(false)
        .init();
    let done = match Cli::parse().command {
        Command::Run(args) => cli::run::run(args),
        Command::Verb(verb) => return cli::verbs::run(verb),
    };
    done.unwrap_or_else(|error| {
        eprintln!("outpatch: {error:#}");
        ExitCode::FAILURE
    })
}
