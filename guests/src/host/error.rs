//! The error for a program that this host lacks.

/// A program or file is missing on this host, and could not be installed.
#[derive(Debug, thiserror::Error)]
#[error(
    "missing on this host: {missing}; \
     run `apt-get install -y --no-install-recommends {packages}` as root"
)]
pub struct ToolError {
    /// The missing programs or files, separated by commas.
    pub missing: String,
    /// The Debian packages that contain them, separated by spaces.
    pub packages: String,
}
