//! `outpatch`: starts a guest, or talks to the VMM of a running one.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

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
    log_to(io::stderr, &io::stderr()).init();
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

/// Writes warnings and errors to `writer`, one a line; in colour only where `stream`, which it
/// writes to, takes colours.
fn log_to<W>(writer: W, stream: &impl IsTerminal) -> impl SubscriberInitExt
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_writer(writer)
        .with_ansi(cli::output::in_colour(stream))
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .with_target(false)
        .finish()
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn lines_of_the_log_have_no_colours_in_a_pipe() {
        let (mut from, to) = io::pipe().unwrap();
        let to = File::from(OwnedFd::from(to));
        let log = log_to(to.try_clone().unwrap(), &to).set_default();
        tracing::warn!(patch = "fix", "the guest is odd");
        drop((log, to));
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        assert_eq!(text.trim(), "WARN the guest is odd patch=\"fix\"");
    }
}
