//! A guest under `outpatch run`: boots it, runs commands in its shell, checks its log, and stops
//! it.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::drive::console::Console;
use crate::drive::diagnose;
use crate::drive::outpatch::Outpatch;
use crate::drive::rest::Rest;
use crate::initramfs::READY;

/// How long a guest may take to reach its shell: ten times what it takes on an idle host.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long one shell command may take unless the caller says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// What the shell that runs our commands prints, in angle brackets, when it starts.
const SCRIPT_SHELL: &str = "script-shell";
/// The command line of every guest's kernel. `tsc=reliable` turns the clocksource watchdog off: on
/// a busy host it sometimes logs a complaint, in patched guests and others, and logs could not be
/// compared.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable";
/// Beginnings of log lines in which a guest complains that it did not run for a while.
///
/// In a bed with more vCPUs than CPUs, guests that are not patched or paused log them as well. The
/// last is from rt kernels, some of which log it while they boot: the console's interrupt thread
/// has the CPU for nearly a whole second of the guest's time.
pub const STOLEN_TIME: [&str; 3] = [
    "hrtimer: interrupt took ",
    "sched: DL replenish lagged too much",
    "sched: RT throttling activated",
];
/// Shell command that prints the kernel's log without time stamps.
const LOG: &str = r"dmesg -r | sed 's/^<[0-9]*>\[[^]]*\] //'";

/// Memory of an ordinary guest, in MiB.
pub const MEMORY_MIB: u32 = 512;

/// What to boot, and the machine's size.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The `outpatch` binary that the guest is patched with.
    pub binary: PathBuf,
    /// The VMM that runs the guest: the same binary, except in tests of the VMM.
    pub vmm: PathBuf,
    /// The path of a bzImage.
    pub kernel: PathBuf,
    /// The path of its initramfs.
    pub initrd: PathBuf,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory in MiB; [`MEMORY_MIB`] for most guests.
    pub memory_mib: u32,
    /// Additions to the kernel's command line.
    pub append: String,
}

/// A running guest. Dropping it kills its VMM.
#[derive(Debug)]
pub struct Guest {
    vmm: Child,
    console: Console,
    outpatch: Outpatch,
    socket: PathBuf,
    commands: u32,
}

/// A guest's log at one time, to compare it with a later one. It has a checksum only: reading the
/// whole text over a serial console is slow.
#[derive(Clone, Debug)]
pub struct Log {
    lines: usize,
    sum: String,
}

impl Guest {
    /// Boots a guest and waits until its shell is ready. `scratch` is the folder for its socket.
    ///
    /// # Errors
    /// When the guest does not reach its shell in time. The error has the console's last lines.
    pub fn boot(spec: &GuestSpec, scratch: &Path) -> Result<Guest> {
        static BOOTS: AtomicU32 = AtomicU32::new(0);
        let socket = scratch.join(format!(
            "guest-{}-{}.sock",
            std::process::id(),
            BOOTS.fetch_add(1, Ordering::Relaxed)
        ));
        let mut vmm = Command::new(&spec.vmm)
            .arg("run")
            .arg("--kernel")
            .arg(&spec.kernel)
            .arg("--initrd")
            .arg(&spec.initrd)
            .args(["--append", &format!("{CMDLINE} {}", spec.append)])
            .args(["--cpus", &spec.cpus.to_string()])
            .args(["--memory", &format!("{}M", spec.memory_mib)])
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", spec.vmm.display()))?;
        let input = vmm.stdin.take().context("no pipe to the VMM")?;
        let output = vmm.stdout.take().context("no pipe from the VMM")?;
        let outpatch = Outpatch::new(&spec.binary, &socket);
        let mut guest = Guest {
            vmm,
            console: Console::new(input, output),
            outpatch,
            socket,
            commands: 0,
        };
        guest.console.wait_for(READY, BOOT_LIMIT)?;
        guest.replace_shell()?;
        Ok(guest)
    }

    /// Replaces the console's interactive shell by one that reads the console as a script:
    /// BusyBox's interactive shell takes the end of a background job for the end of its input when
    /// the terminal does not echo.
    fn replace_shell(&mut self) -> Result<()> {
        self.console.type_in(&format!(
            "stty -echo; exec sh -c \"printf '<%s>' {SCRIPT_SHELL}; exec sh /proc/self/fd/0\"\n"
        ))?;
        self.console
            .wait_for(&format!("<{SCRIPT_SHELL}>"), COMMAND_LIMIT)
            .context("starting the shell that runs the commands")?;
        Ok(())
    }

    /// Waits until the shell of another kernel is ready, which this guest has started (kexec).
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn wait_for_next_boot(&mut self, limit: Duration) -> Result<()> {
        self.console.wait_for(READY, limit)?;
        self.replace_shell()
    }

    /// The `outpatch` command line for this guest.
    #[must_use]
    pub fn outpatch(&self) -> &Outpatch {
        &self.outpatch
    }

    /// A client of this guest's REST API.
    #[must_use]
    pub fn rest(&self) -> Rest {
        Rest::new(&self.socket)
    }

    /// The path of this guest's control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The console, for tests of the console itself.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// Runs a shell command as root; returns what it printed, trimmed.
    ///
    /// # Errors
    /// When the command fails or does not return in time.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(command, COMMAND_LIMIT)
    }

    /// Like [`sh`](Self::sh), with the time limit `limit`.
    ///
    /// # Errors
    /// When the command fails or does not return in time.
    pub fn sh_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (status, text) = self.try_sh(command, limit)?;
        ensure!(
            status == 0,
            "in the guest, `{command}` ended with {status}: {text}"
        );
        Ok(text)
    }

    /// Runs a shell command that may fail; returns its status and what it printed, trimmed.
    ///
    /// # Errors
    /// When the command does not return in time.
    pub fn try_sh(&mut self, command: &str, limit: Duration) -> Result<(i32, String)> {
        self.commands += 1;
        let tag = format!("done-{}", self.commands);
        // The guest puts the marker together, so that an echo of the command does not contain it.
        self.console.type_in(&format!(
            "{{ {command}\n}} 2>&1; printf '\\n<%s:%d>\\n' {tag} $?\n"
        ))?;
        let before = self
            .console
            .wait_for(&format!("<{tag}:"), limit)
            .with_context(|| {
                let tasks = diagnose::explain(&self.outpatch);
                format!("running `{command}`, with {tasks}")
            })?;
        let status = self.console.wait_for(">", limit)?;
        let status = status
            .trim_end_matches('>')
            .parse()
            .with_context(|| format!("status {status:?}"))?;
        let text = before.strip_suffix(&format!("<{tag}:")).unwrap_or(&before);
        Ok((status, text.replace('\r', "").trim().to_owned()))
    }

    /// The kernel's log as it is now, without time stamps.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn dmesg(&mut self) -> Result<Log> {
        let output = self.sh(&format!(
            "{LOG} > /tmp/log; wc -l < /tmp/log; md5sum < /tmp/log; rm /tmp/log"
        ))?;
        let mut words = output.split_whitespace();
        let (Some(lines), Some(sum)) = (words.next(), words.next()) else {
            bail!("the guest describes its log as {output:?}");
        };
        Ok(Log {
            lines: lines.parse().context(output.clone())?,
            sum: sum.to_owned(),
        })
    }

    /// The lines that were added to the log after `before`.
    ///
    /// # Errors
    /// When the earlier lines have changed.
    pub fn dmesg_since(&mut self, before: &Log) -> Result<Vec<String>> {
        let Log { lines, sum } = before;
        let text = self.sh(&format!(
            "{LOG} | head -n {lines} | md5sum; {LOG} | tail -n +{}",
            lines + 1
        ))?;
        let (now, new) = text.split_once('\n').unwrap_or((&text, ""));
        ensure!(
            now.split_whitespace().next() == Some(sum),
            "the first {lines} lines of the guest's log have changed; the log is now\n{}",
            self.sh(LOG)?
        );
        Ok(new.lines().map(str::to_owned).collect())
    }

    /// Checks that nothing in the guest shows that it was patched: no taint, and no new line in its
    /// log since `before` (so no warning and no lockup) except [`STOLEN_TIME`], which is printed.
    ///
    /// # Errors
    /// When the guest is tainted or has new lines in its log.
    pub fn expect_unharmed(&mut self, before: &Log) -> Result<()> {
        let taint = self.sh("cat /proc/sys/kernel/tainted")?;
        let new = self.dmesg_since(before)?;
        ensure!(
            taint == "0",
            "the guest is tainted: {taint}; new lines in its log:\n{}",
            new.join("\n")
        );
        let (stolen, new): (Vec<_>, Vec<_>) = new
            .into_iter()
            .partition(|line| STOLEN_TIME.iter().any(|text| line.starts_with(text)));
        if !stolen.is_empty() {
            println!("the guest reports that it did not run for a while: {stolen:?}");
        }
        ensure!(
            new.is_empty(),
            "new lines in the guest's log:\n{}",
            new.join("\n")
        );
        Ok(())
    }

    /// Powers the guest off and waits until the VMM has ended.
    ///
    /// # Errors
    /// When the VMM does not end in time.
    pub fn poweroff(mut self) -> Result<ExitStatus> {
        self.console.type_in("poweroff -f\n")?;
        self.wait_end(Duration::from_secs(30))
    }

    /// Waits until the VMM has ended; returns its exit status.
    ///
    /// # Errors
    /// When the VMM does not end in time.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.vmm.try_wait()? {
                if let Some(signal) = status.signal() {
                    bail!("the VMM was ended by signal {signal}");
                }
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "the VMM did not end within {limit:?}; the console's last lines:\n{}",
            tail(&self.console.text(), 2000)
        )
    }

    /// Whether the VMM still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.vmm.try_wait(), Ok(None))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if the VMM has ended already.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

fn tail(text: &str, chars: usize) -> String {
    text.chars()
        .skip(text.chars().count().saturating_sub(chars))
        .collect()
}
