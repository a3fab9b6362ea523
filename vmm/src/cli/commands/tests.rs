//! The verbs and their options, held against `docs/ABI`.

use clap::CommandFactory;

use crate::{Cli, abi};

#[test]
fn every_verb_is_described_and_every_described_verb_is_there() {
    let cli = Cli::command();
    let verbs = cli
        .get_subcommands()
        .map(|verb| format!("outpatch {}", verb.get_name()));
    abi::assert_described(&["outpatch "], verbs);
}

#[test]
fn every_option_is_described_and_every_described_option_is_there() {
    for verb in Cli::command().get_subcommands() {
        let text = abi::describing(&format!("outpatch {}", verb.get_name()));
        let mut described: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("--"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        described.sort_unstable();
        let mut options: Vec<&str> = verb.get_arguments().filter_map(|a| a.get_long()).collect();
        options.retain(|option| *option != "help");
        options.sort_unstable();
        assert_eq!(described, options, "outpatch {}", verb.get_name());
        for variable in verb.get_arguments().filter_map(|a| a.get_env()) {
            let variable = variable.to_str().unwrap();
            assert!(
                text.contains(variable),
                "outpatch {}: {variable}",
                verb.get_name()
            );
        }
    }
}

#[test]
fn the_arguments_are_consistent() {
    Cli::command().debug_assert();
}
