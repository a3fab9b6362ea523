//! The bed's two processes, QEMU and the file server: started, connected, and gone when this is dropped or we die.
//!
//! They sit in process groups of their own, so that Ctrl-C reaches only us, and the kernel kills them when the thread that
//! started them dies, however that comes about. Their sockets are unlinked as soon as both ends are connected.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
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
use crate::external::qemu::{DEATH_SIGNAL, with_death_signal, with_libraries};
use crate::host::cache::At;

/// A CPU with AMD's virtualisation. What this emulator lacks is taken out by name, or it complains.
const CPU: &str = "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";
/// How much of what the two processes and the bed's kernel print is kept, for when the bed dies.
const TAIL: usize = 16 << 10;
/// How long QEMU may take to connect.
const CONNECT: Duration = Duration::from_secs(30);

/// How large the emulated machine is.
#[derive(Debug, Clone, Copy)]
pub(super) struct MachineSize {
    /// Number of CPUs.
    pub(super) cpus: u32,
    /// Memory in MiB.
    pub(super) memory_mib: u32,
}

/// A bed that runs.
#[derive(Debug)]
pub(super) struct Machine {
    qemu: Child,
    server: Child,
    /// Our end of the port.
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
        sweep();
        let path =
            std::env::temp_dir().join(format!("outpatch-bed-{}-{number}", std::process::id()));
        // Fails where the name is taken: nobody else can prepare it for us.
        DirBuilder::new().mode(0o700).create(&path).at(&path)?;
        Ok(SocketFolder(path))
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Deletes the folders of callers that were killed in the moment between making one and connecting.
fn sweep() {
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
        let (tree, port) = (folder.0.join("tree"), folder.0.join("port"));
        let tree_listener = UnixListener::bind(&tree).at(&tree)?;
        let port_listener = UnixListener::bind(&port).at(&port)?;
        let mut server = spawn(server_command(files, tree_listener.into()))?;
        let mut qemu = match spawn(qemu_command(files, size, &tree, &port)) {
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
                let said = text(&tail);
                Err(BedError::Setup(format!(
                    "QEMU did not start: {reason}; it said: {said}"
                )))
            }
        }
    }

    /// Ends the bed and says what QEMU's status was, if it had ended by itself, and the last words of the console.
    pub(super) fn post_mortem(mut self) -> (Option<ExitStatus>, String) {
        // A machine that goes down takes a moment to end its process.
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
    let shown = crate::host::tools::command_line(&command);
    command
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| BedError::Setup(format!("{shown}: {e}")))
}

fn server_command(files: &BedFiles, listener: OwnedFd) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        with_death_signal(&files.server, &files.server_libraries)
    } else {
        // It insists on chroot, which is for root: a user namespace has one that is nobody else than we.
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "--", "setpriv"])
            .args(DEATH_SIGNAL)
            .arg(&files.server);
        with_libraries(command, &files.server_libraries)
    };
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

fn qemu_command(files: &BedFiles, size: MachineSize, tree: &Path, port: &Path) -> Command {
    let mut command = files.qemu.command();
    let memory = size.memory_mib;
    command
        // A HPET would take the PIT's place: see `tick` in `guests/programs/bed-init.c`.
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
        .arg(format!("socket,id=tree,path={}", tree.display()))
        .args(["-device", "vhost-user-fs-pci,chardev=tree,tag=host"])
        // Connected after the tree: once we have this one, both are connected.
        .arg("-chardev")
        .arg(format!("socket,id=port,path={}", port.display()))
        .args(["-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=port,name=bed"])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initramfs)
        .args([
            "-append",
            // The check of the timer counts ticks while it spins: on a busy host an emulated CPU sees too few, and panics.
            "console=ttyS0 panic=-1 reboot=t quiet mitigations=off no_timer_check",
        ])
        .stdin(Stdio::null());
    command
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let until = Instant::now() + CONNECT;
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
            let excess = tail.len().saturating_sub(TAIL);
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
