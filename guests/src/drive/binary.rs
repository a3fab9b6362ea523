//! The `outpatch` binary that guests are booted and patched with, built by cargo from this
//! workspace.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Builds `outpatch` in the profile of the running program, and returns its path.
///
/// # Errors
/// When cargo cannot build it.
pub fn build_outpatch() -> Result<PathBuf> {
    // The running program is target/PROFILE/demo, or a test in target/PROFILE/deps/.
    let program = env::current_exe()?;
    let folder = program.parent().context("this program is in no folder")?;
    let is_test = folder.ends_with("deps");
    // For a test, with the features that all crates of the workspace and their tests enable: that
    // binary has been built by `cargo test` already.
    let build = match is_test {
        true => "test --no-run --workspace --test cli",
        false => "build --package vmm --bin outpatch",
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(build.split(' ')).arg("--quiet");
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    ensure!(
        command.status().context("cannot start cargo")?.success(),
        "cargo could not build outpatch"
    );
    let folder = match is_test {
        true => folder.parent().context("deps is in no folder")?,
        false => folder,
    };
    let binary = folder.join("outpatch");
    ensure!(binary.exists(), "cargo built no {}", binary.display());
    Ok(binary)
}
