//! `outpatch dump`.

use std::path::Path;

use vmm::api::types::{Dump, NewDump};

use crate::cli::error::CommandError;
use crate::cli::output::{Output, Tone};
use vmm::client::Client;

/// Has the VMM write a core file.
pub fn dump(
    client: &Client,
    file: &Path,
    json: bool,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    // The VMM may have been started elsewhere.
    let path = std::path::absolute(file)?;
    let path = path.into_os_string().into_string().map_err(|path| {
        CommandError::InvalidState(format!(
            "{} cannot be said in JSON: it is not UTF-8",
            path.display()
        ))
    })?;
    let dump: Dump = client.create("/dumps", &NewDump { path })?;
    if json {
        return Ok(output.json(&dump)?);
    }
    let line = format!(
        "{}: {} MiB, the guest stood still for {} ms",
        dump.path,
        dump.bytes.div_ceil(1 << 20),
        dump.paused_us.div_ceil(1000)
    );
    Ok(output.line(Tone::Good, &line)?)
}
