//! The cache folder: where it is, its locks, and how files and folders are added to it atomically.
//!
//! Everything in it can be deleted at any time; it is fetched or built again when it is next
//! needed. This module must not know of packages, kernels or anything else that is kept here.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

/// Why the cache, or a file that is to go into it, could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither `$OUTPATCH_CACHE` nor `$XDG_CACHE_HOME` is set, and the user has no home folder.
    #[error("no folder for the cache: set OUTPATCH_CACHE or HOME")]
    NoFolder,
    /// The path would be two in a list of folders such as `PATH`.
    #[error("{path}: the cache's path has a colon: set OUTPATCH_CACHE to another", path = .0.display())]
    Colon(PathBuf),
    /// The folder for what make builds can be written by other users.
    #[error("{path} is not a folder of this user alone: remove it", path = .0.display())]
    NotOurs(PathBuf),
    /// A file operation failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder that it was about.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Adds the path to an I/O error.
pub(crate) trait At<T> {
    /// Turns an I/O error into a [`CacheError`] about `path`.
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

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// A lock of the cache, released when this is dropped or the process ends.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// Opens this user's cache: `$OUTPATCH_CACHE`, or `outpatch` in the user's cache folder.
    pub fn open() -> Result<Cache, CacheError> {
        let env = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        let root = env("OUTPATCH_CACHE")
            .map(PathBuf::from)
            .or_else(|| env("XDG_CACHE_HOME").map(|d| PathBuf::from(d).join("outpatch")))
            // Where HOME is not set, this is the folder that the user database names.
            .or_else(|| std::env::home_dir().map(|d| d.join(".cache/outpatch")))
            .ok_or(CacheError::NoFolder)?;
        Cache::at(&root)
    }

    /// Opens the cache in the folder `root`, which is created if necessary.
    pub fn at(root: &Path) -> Result<Cache, CacheError> {
        fs::create_dir_all(root).at(root)?;
        let root = root.canonicalize().at(root)?;
        if root.as_os_str().as_bytes().contains(&b':') {
            return Err(CacheError::Colon(root));
        }
        Ok(Cache { root })
    }

    /// The cache for what make reads and builds: this one, or another if make cannot handle this
    /// one's path. To make, a space ends a file's name, and other characters mean something too.
    ///
    /// The other one is in `/var/tmp`. As its files may be deleted there when they have not been
    /// used for 30 days, it is given up after one to two weeks and built again.
    pub fn for_make(&self) -> Result<Cache, CacheError> {
        let path = self.root.as_os_str().as_bytes();
        if path
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"/._-+".contains(b))
        {
            return Ok(self.clone());
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let week = now.unwrap_or_default().as_secs() / (7 * 24 * 3600);
        let user = rustix::process::geteuid();
        let start = format!("outpatch-{}-{}-", user.as_raw(), fingerprint([path]));
        let parent = Path::new("/var/tmp");
        remove_older(parent, &start, week);
        let root = parent.join(format!("{start}{week}"));
        match DirBuilder::new().mode(0o700).create(&root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).at(&root),
            _ => {}
        }
        let found = fs::symlink_metadata(&root).at(&root)?;
        if !found.is_dir() || found.uid() != user.as_raw() || found.mode() & 0o022 != 0 {
            return Err(CacheError::NotOurs(root));
        }
        Ok(Cache { root })
    }

    /// The cache's absolute path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits for the lock `name`, so that one process at a time fetches or builds something.
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

    /// Creates an empty folder to fill. [`Staging::commit`] gives it its final name; dropping it
    /// deletes it.
    pub fn stage(&self) -> Result<Staging, CacheError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let parent = self.root.join("staging");
        fs::create_dir_all(&parent).at(&parent)?;
        remove_stale(&parent);
        let path = parent.join(format!("{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).at(&path)?;
        Ok(Staging { path })
    }

    /// Writes a file atomically: a reader sees the old content or the new, never a part.
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), CacheError> {
        let staging = self.stage()?;
        let draft = staging.path().join("file");
        fs::write(&draft, content).at(&draft)?;
        staging.publish(&draft, path)
    }
}

/// Hard-links or copies all files of `tree` into the tree `into`, and copies its symbolic links.
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
                // The two may be on different file systems, or on one that has no hard links.
                fs::hard_link(entry.path(), &to)
                    .or_else(|_| fs::copy(entry.path(), &to).map(drop))
                    .at(&to)?;
            }
        }
    }
    Ok(())
}

/// Removes the folders of `parent` whose names are `start` and a week before the last.
fn remove_older(parent: &Path, start: &str, week: u64) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let of = name
            .to_str()
            .and_then(|n| n.strip_prefix(start)?.parse().ok());
        if of.is_some_and(|of: u64| of + 1 < week) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes staging folders of processes that no longer run, for example killed during a download.
fn remove_stale(staging: &Path) {
    for entry in fs::read_dir(staging).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A folder that is being filled, and is not yet part of the cache.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
}

impl Staging {
    /// The folder's path.
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

    /// Moves the whole staging folder to `to`. If another process was first, its result is kept.
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

/// A short name for some content. Equal contents have equal names.
pub fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = DefaultHasher::new();
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn make_gets_a_folder_whose_path_it_can_handle() {
        let parent = std::env::temp_dir().join(format!("outpatch-cache-{}", std::process::id()));
        let plain = Cache::at(&parent.join("plain-1.0")).unwrap();
        assert_eq!(plain.for_make().unwrap().root(), plain.root());
        let spaced = Cache::at(&parent.join("a folder")).unwrap();
        let made = spaced.for_make().unwrap();
        assert_eq!(spaced.for_make().unwrap().root(), made.root());
        let name = made.root().to_str().unwrap();
        assert!(name.starts_with("/var/tmp/outpatch-"), "{name}");
        fs::remove_dir(made.root()).unwrap();
        std::os::unix::fs::symlink("/", made.root()).unwrap();
        let error = spaced.for_make().unwrap_err();
        assert!(matches!(error, CacheError::NotOurs(_)), "{error}");
        fs::remove_file(made.root()).unwrap();
        let error = Cache::at(&parent.join("a:b")).unwrap_err();
        assert!(error.to_string().contains("OUTPATCH_CACHE"), "{error}");
        fs::remove_dir_all(&parent).unwrap();
    }

    #[test]
    fn folders_of_older_weeks_are_removed() {
        let parent = std::env::temp_dir().join(format!("outpatch-weeks-{}", std::process::id()));
        for name in ["a-7", "a-8", "a-9", "b-7", "a-x"] {
            fs::create_dir_all(parent.join(name)).unwrap();
        }
        remove_older(&parent, "a-", 9);
        let mut left: Vec<_> = fs::read_dir(&parent)
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        left.sort_unstable();
        assert_eq!(left, ["a-8", "a-9", "a-x", "b-7"]);
        fs::remove_dir_all(&parent).unwrap();
    }
}
