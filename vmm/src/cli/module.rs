//! Reads the file of a livepatch module.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vmm::api::MAX_MODULE;

use crate::cli::error::CommandError;

/// Reads the whole file, unless it is longer than any module that a VMM accepts.
///
/// # Errors
/// [`CommandError::File`] when it cannot be read, or is too long.
pub fn read_module(file: &Path) -> Result<Vec<u8>, CommandError> {
    read(file).map_err(|source| CommandError::File {
        path: file.to_owned(),
        source,
    })
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(MAX_MODULE).unwrap_or(u64::MAX);
    let mut module = Vec::new();
    let mut start = File::open(file)?.take(limit.saturating_add(1));
    start.read_to_end(&mut module)?;
    if module.len() > MAX_MODULE {
        let why = format!(
            "it is longer than {} MiB, the most that a module can have",
            MAX_MODULE >> 20
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(module)
}
