//! `outpatch dump`.

use std::path::Path;

use vmm::api::types::{Dump, NewDump};

use crate::cli::commands::VerbError;
use crate::cli::output::{Output, Tone};
use vmm::client::Client;

/// Has the VMM write a core file.
pub fn dump(
    connection: &Client,
    file: &Path,
    json: bool,
    screen: &mut Output<'_>,
) -> Result<(), VerbError> {
    // The VMM may have been started elsewhere.
    let path = std::path::absolute(file)?;
    let path = path.into_os_string().into_string().map_err(|path| {
        VerbError::InvalidState(format!(
            "{} cannot be said in JSON: it is not UTF-8",
            path.display()
        ))
    })?;
    let dump: Dump = connection.create("/dumps", &NewDump { path })?;
    if json {
        return Ok(screen.json(&dump)?);
    }
    let line = format!(
        "{}: {} MiB, the guest stood still for {} ms",
        dump.path,
        dump.bytes.div_ceil(1 << 20),
        dump.paused_us.div_ceil(1000)
    );
    Ok(screen.line(Tone::Good, &line)?)
}
