//! `outpatch dump`: a core file of the running guest.

use std::path::Path;

use vmm::api::types::{Dump, NewDump};
use vmm::client::Client;

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};

/// Requests a core file from the VMM.
pub fn dump(
    client: &Client,
    file: &Path,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    // The VMM may have another working directory.
    let path = std::path::absolute(file)?;
    let path = path.into_os_string().into_string().map_err(|path| {
        CommandError::InvalidState(format!(
            "{}: the path is not UTF-8, so it cannot be sent as JSON",
            path.display()
        ))
    })?;
    let dump: Dump = client.post("/dumps", &NewDump { path })?;
    if json {
        return Ok(output.json(&dump)?);
    }
    let line = format!(
        "{}: {} MiB, guest paused for {} ms",
        dump.path,
        dump.bytes.div_ceil(1 << 20),
        dump.paused_us.div_ceil(1000)
    );
    Ok(output.line(Tone::Good, &line)?)
}
