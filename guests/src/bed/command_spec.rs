//! The command that a nested bed shall run, as its init program reads it.
//!
//! The reader is `read_spec` in `guests/programs/bed-init.c`. This module knows nothing of how it
//! is sent.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Command;

use crate::bed::error::BedError;

/// Set in the environment of the command, so that it can tell that it runs in a nested bed.
const INSIDE: &str = "OUTPATCH_BED";

/// The command as a list of `key=value` strings, each followed by a zero byte.
///
/// `writable` are the folders that the command may write on the host. `terminal` is the number of
/// rows and columns of the command's terminal, if it gets one.
pub(super) fn encode(
    command: &Command,
    writable: &[PathBuf],
    terminal: Option<(u16, u16)>,
) -> Result<Vec<u8>, BedError> {
    let mut spec = Vec::new();
    let mut put = |key: &str, value: &OsStr| put(&mut spec, key, value);
    let number = |n: u16| n.to_string();
    if let Some((rows, columns)) = terminal {
        put("tty", OsStr::new("1"));
        put("rows", number(rows).as_ref());
        put("cols", number(columns).as_ref());
    }
    let here = std::env::current_dir()
        .map_err(|e| BedError::Command(format!("the current folder: {e}")))?;
    let folder = command
        .get_current_dir()
        .map_or(here.clone(), |d| here.join(d));
    put("cwd", folder.as_os_str());
    for folder in writable {
        let real = folder
            .canonicalize()
            .map_err(|e| BedError::Command(format!("writable folder {}: {e}", folder.display())))?;
        if !real.is_dir() {
            return Err(BedError::Command(format!(
                "writable folder {} is not a folder",
                folder.display()
            )));
        }
        put("writable", real.as_os_str());
    }
    put("arg", command.get_program());
    for argument in command.get_args() {
        put("arg", argument);
    }
    let mut environment: BTreeMap<_, _> = std::env::vars_os().collect();
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => environment.insert(name.to_owned(), value.to_owned()),
            None => environment.remove(name),
        };
    }
    // The host's folder for temporary files is read-only in the bed, unless it is `/tmp`.
    if !command.get_envs().any(|(name, _)| name == "TMPDIR") {
        environment.remove(OsStr::new("TMPDIR"));
    }
    environment.insert(INSIDE.into(), "1".into());
    for (name, value) in environment {
        let mut pair = name;
        pair.push("=");
        pair.push(value);
        put("env", &pair);
    }
    Ok(spec)
}

/// Adds how many of the host's files the bed may know at once.
pub(super) fn put_max_files(spec: &mut Vec<u8>, files: u64) {
    put(spec, "files", OsStr::new(&files.to_string()));
}

fn put(spec: &mut Vec<u8>, key: &str, value: &OsStr) {
    spec.extend_from_slice(key.as_bytes());
    spec.push(b'=');
    spec.extend_from_slice(value.as_bytes());
    spec.push(0);
}
