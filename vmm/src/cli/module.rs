//! Reads the file of a livepatch module.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use vmm::api::MAX_MODULE;

use crate::cli::error::CommandError;

/// How long reading a module may take when the command has no `--timeout`.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the whole file, unless it is longer than any module that a VMM accepts, or does not end in
/// time: a FIFO or a terminal may never.
///
/// # Errors
/// [`CommandError::File`] when it cannot be read, is too long or takes too long.
pub fn read_module(file: &Path, timeout: Duration) -> Result<Vec<u8>, CommandError> {
    read_in_time(file, timeout).map_err(|source| CommandError::File {
        path: file.to_owned(),
        source,
    })
}

/// Reads in a thread of its own, as opening a FIFO and reading it cannot be interrupted otherwise.
/// When the time is over, the thread is left to end with the process.
fn read_in_time(file: &Path, timeout: Duration) -> io::Result<Vec<u8>> {
    let (sender, receiver) = channel();
    let path = file.to_owned();
    thread::Builder::new()
        .name("module".into())
        .spawn(move || drop(sender.send(read(&path))))?;
    match receiver.recv_timeout(timeout) {
        Ok(module) => module,
        Err(RecvTimeoutError::Timeout) => {
            let why = format!(
                "it did not end in {} s (is it a pipe that is not written to?)",
                timeout.as_secs_f64()
            );
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        }
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the reading thread failed")),
    }
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(MAX_MODULE).unwrap_or(u64::MAX);
    let mut module = Vec::new();
    let mut start = File::open(file)?.take(limit.saturating_add(1));
    start.read_to_end(&mut module)?;
    if module.len() > MAX_MODULE {
        let why = format!(
            "it is longer than {} MiB, the most that a module can have",
            MAX_MODULE >> 20
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::Instant;

    use vmm::api::testing::TempDir;

    use super::*;

    #[test]
    fn a_pipe_without_a_writer_is_given_up() {
        let dir = TempDir::new();
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let started = Instant::now();
        let error = read_module(&fifo, Duration::from_millis(300)).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(5));
        let text = error.to_string();
        assert!(text.contains("it did not end in 0.3 s"), "{text}");
    }

    #[test]
    fn a_pipe_that_is_written_to_is_read() {
        let (from, mut to) = io::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", from.as_raw_fd());
        io::Write::write_all(&mut to, b"module").unwrap();
        drop(to);
        let module = read_module(Path::new(&path), READ_TIMEOUT).unwrap();
        assert_eq!(module, b"module");
    }
}
