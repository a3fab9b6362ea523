//! What goes wrong on the way to a package.

use std::path::PathBuf;

use crate::host::cache::CacheError;
use crate::host::error::ToolError;

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A program of this machine is missing.
    #[error(transparent)]
    Missing(#[from] ToolError),
    /// No suite has the package.
    #[error("no package {name} in {suites} (apt's lists are in {lists})", lists = .lists.display())]
    NotFound {
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        suites: String,
        /// apt's lists, to look by hand.
        lists: PathBuf,
    },
    /// apt or dpkg failed.
    #[error("{command} failed: {stderr}")]
    Tool {
        /// The command line.
        command: String,
        /// Its last words.
        stderr: String,
    },
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl PackageError {
    /// The archive has not what its lists name.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, PackageError::Tool { stderr, .. } if stderr.contains("404"))
    }
}
