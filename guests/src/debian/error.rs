//! The errors of fetching a package.

use std::path::PathBuf;

use crate::host::cache::CacheError;
use crate::host::error::ToolError;

/// Why a package could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A program is missing on this host.
    #[error(transparent)]
    Missing(#[from] ToolError),
    /// No suite has the package.
    #[error("no package {name} in {suites} (apt's lists are in {lists})", lists = .lists.display())]
    NotFound {
        /// The name or pattern that was requested.
        name: String,
        /// The suites that were searched, separated by commas.
        suites: String,
        /// The folder of apt's package lists, for a manual search.
        lists: PathBuf,
    },
    /// A program that was run, mostly apt or dpkg, failed.
    #[error("{command} failed: {stderr}")]
    Tool {
        /// Its command line.
        command: String,
        /// What it printed on standard error.
        stderr: String,
    },
    /// The cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl PackageError {
    /// Whether the archive does not have a file that its lists name.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, PackageError::Tool { stderr, .. } if stderr.contains("404"))
    }
}
