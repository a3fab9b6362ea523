//! The cache directory: where it is, its lock, and how a folder comes to be in it whole or not at all.
//!
//! Everything below it can be deleted at any time; it is fetched or built again when next wanted.
//! This module knows nothing of packages, kernels or what else is kept here.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, flock};

/// A cache directory that could not be used, with the path at fault.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither `$OUTPATCH_CACHE`, `$XDG_CACHE_HOME` nor `$HOME` says where the cache is.
    #[error("no place for the cache: set OUTPATCH_CACHE or HOME")]
    NoPlace,
    /// A file operation in the cache failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Attaches a path to an I/O error.
pub(crate) trait At<T> {
    /// The error, with the path that it is about.
    fn at(self, path: &Path) -> Result<T, CacheError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, CacheError> {
        self.map_err(|source| CacheError::Io {
            path: path.to_owned(),
            source,
        })
    }
}

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// The cache's lock, held until dropped. Dies with the process that holds it.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// The cache of this user: `$OUTPATCH_CACHE`, or `outpatch` in the user's cache folder.
    pub fn open() -> Result<Cache, CacheError> {
        let env = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        let root = env("OUTPATCH_CACHE")
            .map(PathBuf::from)
            .or_else(|| env("XDG_CACHE_HOME").map(|d| PathBuf::from(d).join("outpatch")))
            .or_else(|| env("HOME").map(|d| PathBuf::from(d).join(".cache/outpatch")))
            .ok_or(CacheError::NoPlace)?;
        Cache::at(&root)
    }

    /// The cache in a folder of the caller's choice.
    pub fn at(root: &Path) -> Result<Cache, CacheError> {
        fs::create_dir_all(root).at(root)?;
        let root = root.canonicalize().at(root)?;
        Ok(Cache { root })
    }

    /// Where the cache is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits for the lock called `name`, so that one process at a time fetches or builds.
    pub fn lock(&self, name: &str) -> Result<CacheLock, CacheError> {
        let path = self.root.join(format!("{name}.lock"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .at(&path)?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .at(&path)?;
        Ok(CacheLock { _file: file })
    }

    /// An empty folder to fill; [`Staging::commit`] gives it its final name, dropping it deletes it.
    pub fn stage(&self) -> Result<Staging, CacheError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let parent = self.root.join("staging");
        fs::create_dir_all(&parent).at(&parent)?;
        sweep(&parent);
        let path = parent.join(format!("{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).at(&path)?;
        Ok(Staging { path })
    }

    /// Writes a file so that readers see the old or the new content, never a part.
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), CacheError> {
        let staging = self.stage()?;
        let draft = staging.path().join("file");
        fs::write(&draft, content).at(&draft)?;
        staging.publish(&draft, path)
    }
}

/// Links the files of a tree into another one, folder by folder.
pub fn link_tree(tree: &Path, into: &Path) -> Result<(), CacheError> {
    let mut waiting = vec![PathBuf::new()];
    while let Some(folder) = waiting.pop() {
        let to = into.join(&folder);
        fs::create_dir_all(&to).at(&to)?;
        let from = tree.join(&folder);
        for entry in fs::read_dir(&from).at(&from)?.flatten() {
            let kind = entry.file_type().at(&entry.path())?;
            let to = to.join(entry.file_name());
            if kind.is_dir() {
                waiting.push(folder.join(entry.file_name()));
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).at(&entry.path())?;
                std::os::unix::fs::symlink(target, &to).at(&to)?;
            } else {
                fs::hard_link(entry.path(), &to).at(&to)?;
            }
        }
    }
    Ok(())
}

/// Removes what processes that are gone (killed in mid-download, say) left behind.
fn sweep(staging: &Path) {
    for entry in fs::read_dir(staging).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A folder being filled.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
}

impl Staging {
    /// Where to put things.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves one file or folder inside the staging folder to its final place.
    pub fn publish(&self, from: &Path, to: &Path) -> Result<(), CacheError> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).at(parent)?;
        }
        fs::rename(from, to).at(to)
    }

    /// Makes the whole staging folder appear at `to`. Where another process was first, its result stands.
    pub fn commit(self, to: &Path) -> Result<(), CacheError> {
        if to.exists() {
            return Ok(());
        }
        self.publish(&self.path, to)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A short name for some content: what is built from the same input has the same name.
pub fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = DefaultHasher::new();
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
    format!("{:016x}", hasher.finish())
}
