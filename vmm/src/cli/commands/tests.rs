//! The commands and their options, compared with `docs/ABI`.

use clap::CommandFactory;

use crate::{Cli, abi};

#[test]
fn every_command_is_described_and_every_described_command_exists() {
    let cli = Cli::command();
    let commands = cli
        .get_subcommands()
        .map(|command| format!("outpatch {}", command.get_name()));
    abi::assert_described(&["outpatch "], commands);
}

#[test]
fn every_option_is_described_and_every_described_option_exists() {
    for command in Cli::command().get_subcommands() {
        let text = abi::describing(&format!("outpatch {}", command.get_name()));
        let mut described: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("--"))
            .filter_map(|line| line.split([' ', '\t', ',']).next())
            .collect();
        described.sort_unstable();
        let mut options: Vec<&str> = command
            .get_arguments()
            .filter_map(|a| a.get_long())
            .collect();
        options.retain(|option| *option != "help");
        options.sort_unstable();
        assert_eq!(described, options, "outpatch {}", command.get_name());
        for short in command.get_arguments().filter_map(|a| a.get_short()) {
            let short = format!(", -{short}\t");
            assert!(
                short == ", -h\t" || text.contains(&short),
                "outpatch {}: {short}",
                command.get_name()
            );
        }
        for variable in command.get_arguments().filter_map(|a| a.get_env()) {
            let variable = variable.to_str().unwrap();
            assert!(
                text.contains(variable),
                "outpatch {}: {variable}",
                command.get_name()
            );
        }
    }
}

#[test]
fn the_arguments_are_consistent() {
    Cli::command().debug_assert();
}
