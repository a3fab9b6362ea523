//! The two processes of a nested bed, QEMU and the file server: starts, connects and stops them.
//!
//! They are in process groups of their own, so that Ctrl-C reaches only this process, and the
//! kernel kills them when the thread that started them ends for any reason. Their sockets are
//! unlinked as soon as both ends are connected. This module must not know what is sent over the
//! port.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::bed::error::BedError;
use crate::bed::files::BedFiles;
use crate::external::qemu::with_death_signal;
use crate::host::cache::At;

/// An AMD CPU with SVM. Features that QEMU's emulation lacks are disabled by name, as it prints
/// warnings otherwise.
const CPU: &str = "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";
/// How many bytes of the output of both processes and the bed's kernel are kept, for the case that
/// the bed dies.
const MAX_TAIL: usize = 16 << 10;
/// A limit on the files of the host that a bed knows at once, so that several beds do not use up
/// the host's descriptors.
const MAX_FILES: u64 = 100_000;
/// How many files a bed knows at once if the server's limit is unknown.
const MIN_FILES: u64 = 400;
/// How long QEMU may take to connect to the port's socket.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The socket of the file server, in the folder of the sockets.
const TREE: &str = "tree";
/// The socket of the virtio port, in the folder of the sockets.
const PORT: &str = "port";

/// How large the emulated machine is.
#[derive(Debug, Clone, Copy)]
pub(super) struct MachineSize {
    /// Number of CPUs.
    pub(super) cpus: u32,
    /// Memory in MiB.
    pub(super) memory_mib: u32,
}

/// A running nested bed.
#[derive(Debug)]
pub(super) struct Machine {
    qemu: Child,
    server: Child,
    /// Our end of the virtio port.
    pub(super) port: UnixStream,
    tail: Arc<Mutex<VecDeque<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// A private folder for the sockets, deleted when dropped.
struct SocketFolder(PathBuf);

impl SocketFolder {
    fn create() -> Result<SocketFolder, BedError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        remove_stale();
        let path =
            std::env::temp_dir().join(format!("outpatch-bed-{}-{number}", std::process::id()));
        // Fails if the name is taken: no other user can create the folder in advance.
        DirBuilder::new().mode(0o700).create(&path).at(&path)?;
        Ok(SocketFolder(path))
    }
}

impl SocketFolder {
    /// A socket of this name. The folder's own path may be longer than a socket's address can be.
    fn listen(&self, name: &str) -> Result<UnixListener, BedError> {
        let folder = File::open(&self.0).at(&self.0)?;
        let short = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
        Ok(UnixListener::bind(short).at(&self.0)?)
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes sure that the two processes can have sockets.
pub(super) fn check_sockets() -> Result<(), BedError> {
    let made = SocketFolder::create().and_then(|folder| folder.listen(PORT));
    made.map(drop).map_err(|e| {
        BedError::Setup(format!(
            "no sockets in the folder for temporary files: {e}; \
             run `export TMPDIR=FOLDER` with a folder that you may write"
        ))
    })
}

/// Deletes the folders of processes that were killed between creating one and connecting.
fn remove_stale() {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|n| n.strip_prefix("outpatch-bed-")?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Machine {
    pub(super) fn start(files: &BedFiles, size: MachineSize) -> Result<Machine, BedError> {
        let folder = SocketFolder::create()?;
        let (tree_listener, port_listener) = (folder.listen(TREE)?, folder.listen(PORT)?);
        let mut server = spawn(server_command(files, tree_listener.into()))?;
        let mut qemu = match spawn(qemu_command(files, size, &folder.0)) {
            Ok(qemu) => qemu,
            Err(e) => {
                end(&mut server);
                return Err(e);
            }
        };
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let mut readers = Vec::new();
        for child in [&mut server, &mut qemu] {
            if let Some(from) = child.stdout.take() {
                readers.push(keep_tail(from, &tail));
            }
            if let Some(from) = child.stderr.take() {
                readers.push(keep_tail(from, &tail));
            }
        }
        match accept(&port_listener, &mut qemu) {
            Ok(port) => Ok(Machine {
                qemu,
                server,
                port,
                tail,
                readers,
            }),
            Err(reason) => {
                end(&mut qemu);
                end(&mut server);
                for reader in readers {
                    let _ = reader.join();
                }
                let output = text(&tail);
                Err(BedError::Setup(format!(
                    "QEMU did not start: {reason}; its output: {output}"
                )))
            }
        }
    }

    /// How many of the host's files the bed may know at once: the server has one descriptor for
    /// each, and some that are open. What the bed still knows when it forgets all others must fit,
    /// too, and a busy server closes descriptors later than it opens them, so this is a quarter of
    /// the server's limit.
    pub(super) fn max_files(&self) -> u64 {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.server.id()));
        let limit = limits.ok().and_then(|text| {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix("Max open files"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        });
        limit.map_or(MIN_FILES, |limit| limit / 4).min(MAX_FILES)
    }

    /// Stops the bed. Returns QEMU's exit status, if it had ended by itself, and the last lines of
    /// the console.
    pub(super) fn post_mortem(mut self) -> (Option<ExitStatus>, String) {
        // QEMU takes a moment to exit after its machine has died.
        let mut status = None;
        for _ in 0..20 {
            status = self.qemu.try_wait().ok().flatten();
            if status.is_some() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.stop();
        (status, text(&self.tail))
    }

    fn stop(&mut self) {
        end(&mut self.qemu);
        end(&mut self.server);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn spawn(mut command: Command) -> Result<Child, BedError> {
    let command_line = crate::host::tools::command_line(&command);
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| BedError::Setup(format!("{command_line}: {e}")))
}

fn server_command(files: &BedFiles, listener: OwnedFd) -> Command {
    let mut command = with_death_signal(&files.server, &files.server_libraries);
    command.env("LD_PRELOAD", &files.server_preload);
    command
        .args([
            "--fd=0",
            "-o",
            "source=/",
            "-o",
            "cache=always",
            "-o",
            "sandbox=chroot",
            "-o",
            "log_level=warn",
        ])
        .stdin(Stdio::from(listener));
    command
}

/// QEMU runs in the folder of the sockets: in their paths, a comma would end the option.
fn qemu_command(files: &BedFiles, size: MachineSize, sockets: &Path) -> Command {
    let mut command = files.qemu.command();
    command.current_dir(sockets);
    let memory = size.memory_mib;
    command
        // An HPET would replace the PIT: see `tick` in `guests/programs/bed-init.c`.
        .args(["-machine", "pc,hpet=off"])
        .args(["-accel", "tcg,thread=multi,tb-size=512"])
        .args(["-cpu", CPU])
        .args(["-smp", &size.cpus.to_string(), "-m", &format!("{memory}M")])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=mem,size={memory}M,share=on"
        ))
        .args(["-numa", "node,memdev=mem"])
        .args([
            "-chardev",
            "file,id=console,path=/dev/stdout",
            "-serial",
            "chardev:console",
        ])
        .arg("-chardev")
        .arg(format!("socket,id=tree,path={TREE}"))
        .args(["-device", "vhost-user-fs-pci,chardev=tree,tag=host"])
        // QEMU connects this after the tree: once it is connected, both are.
        .arg("-chardev")
        .arg(format!("socket,id=port,path={PORT}"))
        .args(["-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=port,name=bed"])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initramfs)
        .args([
            "-append",
            // The kernel's timer check counts ticks in a busy loop: on a busy host an emulated CPU
            // sees too few of them and panics.
            "console=ttyS0 panic=-1 reboot=t quiet mitigations=off no_timer_check",
        ])
        .stdin(Stdio::null());
    command
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let until = Instant::now() + CONNECT_LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            Err(_) => {}
        }
        if let Some(status) = qemu.try_wait()? {
            return Err(io::Error::other(status.to_string()));
        }
        if Instant::now() > until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn keep_tail(
    mut from: impl Read + Send + 'static,
    tail: &Arc<Mutex<VecDeque<u8>>>,
) -> JoinHandle<()> {
    let tail = Arc::clone(tail);
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut chunk) {
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend(chunk.get(..n).unwrap_or_default());
            let excess = tail.len().saturating_sub(MAX_TAIL);
            tail.drain(..excess);
        }
    })
}

fn text(tail: &Mutex<VecDeque<u8>>) -> String {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(tail.make_contiguous())
        .trim()
        .to_owned()
}
