//! Cores of guests that something was found in, kept for whoever asks for them.

use std::{env, path::Path, process::Command};

use anyhow::{Context, Result, ensure};

/// The folder to keep them in; without it none is kept.
const FOLDER: &str = "OUTPATCH_KEEP_CORES";
/// In the scratch folder of a scenario, the core of a guest that it failed with.
pub const OF_A_FAILURE: &str = "failed.core";

/// Whether somebody asks for cores.
pub fn are_kept() -> bool {
    env::var_os(FOLDER).is_some()
}

/// Keeps this one, if cores are kept.
pub fn keep(core: &Path) -> Result<()> {
    let Some(folder) = env::var_os(FOLDER) else {
        return Ok(());
    };
    // Scenarios and runs have cores of the same name.
    let folder = Path::new(&folder);
    let taken = folder
        .read_dir()
        .with_context(|| folder.display().to_string())?
        .count();
    let name = core.file_name().context("a core without a name")?;
    let to = folder.join(format!("{taken}-{}", name.to_string_lossy()));
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always").arg(core).arg(&to);
    ensure!(copy.status()?.success(), "cannot keep {}", core.display());
    println!("kept {}", to.display());
    Ok(())
}
