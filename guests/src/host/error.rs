//! What is said of a program that this machine lacks.

/// A program that this machine needs is missing, and we may not install it.
#[derive(Debug, thiserror::Error)]
#[error(
    "missing on this machine: {missing}; run `apt-get install -y --no-install-recommends {packages}` as root"
)]
pub struct ToolError {
    /// The programs or files.
    pub missing: String,
    /// The Debian packages that have them.
    pub packages: String,
}
