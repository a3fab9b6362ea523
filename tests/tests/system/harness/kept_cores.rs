//! Core files of guests in which a scenario found a fault, kept when the environment requests it.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Environment variable: the folder to keep core files in. Without it none is kept.
const FOLDER: &str = "OUTPATCH_KEEP_CORES";
/// In the scratch folder of a scenario, the core of the guest in which it failed.
pub const OF_A_FAILURE: &str = "failed.core";

/// Whether the environment requests that cores are kept.
pub fn are_kept() -> bool {
    env::var_os(FOLDER).is_some()
}

/// Copies `core` to the folder of kept cores, if there is one.
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
