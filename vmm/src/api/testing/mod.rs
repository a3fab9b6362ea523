//! What tests share: a temporary directory, a fake guest, and a served fake guest with its client.
//!
//! The tests of the command line use it from outside, through the feature `testing`.

mod fake_guest;
#[cfg(test)]
mod served;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub use fake_guest::{ELF, FakeGuest, module};
#[cfg(test)]
pub(crate) use served::{Answer, Served};

/// A directory that is removed when its owner is dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates an empty directory of a unique name.
    ///
    /// # Panics
    /// When the directory cannot be created.
    #[expect(clippy::new_without_default, reason = "it creates a directory")]
    #[must_use]
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("outpatch-{}-{unique}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    /// The directory's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
