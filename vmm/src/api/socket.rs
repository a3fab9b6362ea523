//! The control socket's file: claimed by one VMM, private to its user, removed when the VMM ends.
//!
//! This module knows the file system and nothing of HTTP. The file has mode 0600 from its creation:
//! the mode is set on the socket before `bind`, which gives it to the file (`net/unix/af_unix.c:
//! unix_bind_bsd`).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How long another VMM that starts in the same directory may take to claim its own socket.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);

/// The most connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the control socket could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A process listens on it.
    #[error(
        "{} is in use by a running VMM; choose another --socket, or stop that one first",
        .0.display()
    )]
    InUse(PathBuf),
    /// The file exists and is not a socket.
    #[error("{} exists and is not a socket; remove it or choose another --socket", .0.display())]
    NotASocket(PathBuf),
    /// The path is longer than a socket address can be; its length in bytes.
    #[error(
        "the socket path is {0} bytes long, and a Unix socket's has at most 107: \
         choose a shorter --socket"
    )]
    TooLong(usize),
    /// Another VMM is claiming its socket in this directory and does not finish.
    #[error("another VMM is starting in {} and does not finish; try again", .0.display())]
    Contended(PathBuf),
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Os {
        /// What failed, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// A claimed control socket; dropping it removes the file.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's file, removed on drop unless another file has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode number of the file that was created.
    id: (u64, u64),
}

impl ControlSocket {
    /// Claims `path`. Replaces a file left by a VMM that has ended; refuses one in use.
    ///
    /// # Errors
    /// [`SocketError`]; nothing at `path` has changed then.
    pub fn claim(path: &Path) -> Result<ControlSocket, SocketError> {
        let len = path.as_os_str().len();
        if len > 107 {
            return Err(SocketError::TooLong(len));
        }
        // Two VMMs that find the same stale file must not remove each other's new file: one VMM at
        // a time claims a socket in a directory.
        let _lock = lock_directory(path)?;
        remove_stale(path)?;
        let listener = bind_private(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => SocketError::InUse(path.to_owned()),
            _ => os("bind a socket at", path, source),
        })?;
        let meta = path
            .symlink_metadata()
            .map_err(|source| os("stat", path, source))?;
        let file = SocketFile {
            path: path.to_owned(),
            id: (meta.dev(), meta.ino()),
        };
        Ok(ControlSocket { listener, file })
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The listener, non-blocking, and the file to keep for as long as it is served.
    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn os(action: &'static str, path: &Path, source: io::Error) -> SocketError {
    SocketError::Os {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Locks the directory of `path` against other VMMs; closing the returned file releases the lock.
fn lock_directory(path: &Path) -> Result<File, SocketError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let file =
        File::open(directory).map_err(|source| os("open the directory", directory, source))?;
    let deadline = Instant::now() + CLAIM_TIMEOUT;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // A file system without locks: continue without one, as `bind` still lets one VMM win.
            Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOSYS) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(os("lock the directory", directory, error.into())),
        }
        if Instant::now() >= deadline {
            return Err(SocketError::Contended(directory.to_owned()));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Removes the socket of a VMM that has ended: no process accepts connections on it any more.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(os("stat", path, source)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match probe(path) {
        Ok(()) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| os("remove the stale", path, source))
        }
        // A full backlog belongs to a process, too.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse(path.to_owned()))
        }
        Err(source) => Err(os("probe", path, source)),
    }
}

/// Connects to `path` and disconnects, without waiting for a server that does not accept.
fn probe(path: &Path) -> io::Result<()> {
    let socket = stream_socket()?;
    Ok(rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?)
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = SocketType::STREAM;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        stream,
        flags,
        None,
    )?)
}

/// A listening socket at `path` that only its owner can open.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let socket = stream_socket()?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::api::testing::TempDir;

    #[test]
    fn the_file_is_private_and_removed_with_its_owner() {
        let dir = TempDir::new();
        let path = dir.path().join("vm.sock");
        let socket = ControlSocket::claim(&path).unwrap();
        let mode = path.symlink_metadata().unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_refused_and_untouched() {
        let dir = TempDir::new();
        let path = dir.path().join("vm.sock");
        let first = ControlSocket::claim(&path).unwrap();
        let error = ControlSocket::claim(&path).unwrap_err();
        assert!(matches!(&error, SocketError::InUse(p) if *p == path));
        assert!(!error.to_string().contains('\n'));
        UnixStream::connect(first.path()).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = TempDir::new();
        let path = dir.path().join("vm.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = ControlSocket::claim(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = TempDir::new();
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, "mine").unwrap();
        let error = ControlSocket::claim(&path).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn the_file_of_a_successor_survives_our_end() {
        let dir = TempDir::new();
        let path = dir.path().join("vm.sock");
        let first = ControlSocket::claim(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = ControlSocket::claim(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn unusable_paths_are_named() {
        let dir = TempDir::new();
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(
            ControlSocket::claim(&long),
            Err(SocketError::TooLong(_))
        ));
        let nowhere = dir.path().join("absent/vm.sock");
        let error = ControlSocket::claim(&nowhere).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
    }

    #[test]
    fn one_of_many_concurrent_claims_wins() {
        let dir = TempDir::new();
        let path = dir.path().join("vm.sock");
        drop(UnixListener::bind(&path).unwrap());
        let claims: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || ControlSocket::claim(&path))
            })
            .collect();
        let results: Vec<_> = claims.into_iter().map(|c| c.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
        for result in &results {
            assert!(matches!(result, Ok(_) | Err(SocketError::InUse(_))));
        }
    }
}
