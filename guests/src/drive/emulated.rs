//! A guest that QEMU emulates, on any host, for core files as QEMU writes them. outpatch's own VMM
//! has no part in it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::drive::console::Console;
use crate::external::qemu::Qemu;
use crate::initramfs::READY;

/// How long an emulated guest may take to reach its shell: several times what it takes on an idle
/// host.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long QEMU may be silent on its control socket.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// What to boot, and the machine's size.
#[derive(Clone, Debug)]
pub struct EmulatedSpec<'a> {
    /// The path of a bzImage.
    pub kernel: &'a Path,
    /// The path of its initramfs.
    pub initrd: &'a Path,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// A running guest. Dropping it kills its QEMU.
#[derive(Debug)]
pub struct Emulated {
    qemu: Child,
    console: Console,
    control: BufReader<UnixStream>,
    socket: PathBuf,
}

impl Emulated {
    /// Boots a guest and waits until its shell is ready.
    ///
    /// # Errors
    /// When QEMU does not start, or the guest does not reach its shell in time.
    pub fn boot(qemu: &Qemu, spec: &EmulatedSpec<'_>, scratch: &Path) -> Result<Emulated> {
        let socket = scratch.join("qmp.sock");
        let mut command = qemu.command();
        command
            .args(["-machine", "q35", "-accel", "tcg", "-cpu", "max"])
            .args(["-smp", &spec.cpus.to_string()])
            .args(["-m", &format!("{}M", spec.memory_mib)])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(spec.kernel)
            .arg("-initrd")
            .arg(spec.initrd)
            .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]);
        let mut qemu = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start QEMU")?;
        let input = qemu.stdin.take().context("no pipe to QEMU")?;
        let output = qemu.stdout.take().context("no pipe from QEMU")?;
        let mut console = Console::new(input, output);
        let booted = console
            .wait_for(READY, BOOT_LIMIT)
            .and_then(|_| connect(&socket));
        match booted {
            Ok(control) => Ok(Emulated {
                qemu,
                console,
                control,
                socket,
            }),
            Err(error) => {
                // Both fail only if QEMU has ended already.
                let _ = qemu.kill();
                let _ = qemu.wait();
                Err(error)
            }
        }
    }

    /// The guest's serial console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// Stops the guest's CPUs permanently.
    ///
    /// # Errors
    /// When QEMU reports an error.
    pub fn stop(&mut self) -> Result<()> {
        call(&mut self.control, &json!({"execute": "stop"}))
    }

    /// Writes an ELF core of the guest's memory and its CPUs' registers to `file`.
    ///
    /// # Errors
    /// When QEMU reports an error.
    pub fn dump_guest_memory(&mut self, file: &Path) -> Result<()> {
        let protocol = format!("file:{}", file.display());
        let arguments = json!({"paging": false, "protocol": protocol});
        call(
            &mut self.control,
            &json!({"execute": "dump-guest-memory", "arguments": arguments}),
        )
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // These fail only if QEMU has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

fn connect(socket: &Path) -> Result<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut control = BufReader::new(stream);
    let greeting = read(&mut control)?;
    ensure!(greeting.get("QMP").is_some(), "QEMU greets with {greeting}");
    call(&mut control, &json!({"execute": "qmp_capabilities"}))?;
    Ok(control)
}

/// Sends one command and waits for its answer. Events that arrive in between are skipped.
fn call(control: &mut BufReader<UnixStream>, command: &Value) -> Result<()> {
    writeln!(control.get_mut(), "{command}")?;
    loop {
        let answer = read(control)?;
        if answer.get("event").is_none() {
            ensure!(answer.get("return").is_some(), "{command}: {answer}");
            return Ok(());
        }
    }
}

fn read(control: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    control.read_line(&mut line).context("QEMU is silent")?;
    serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}"))
}
