//! A module's file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vmm::api::routes::MAX_MODULE;

use crate::cli::error::CommandError;

/// The whole file; one that no VMM would take is not read to its end.
///
/// # Errors
/// [`CommandError::File`].
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
        let why = format!("longer than {} MiB, which no module is", MAX_MODULE >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(module)
}
