//! One guest under `outpatch run`: booted, driven through its shell, and stopped.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::drive::console::Console;
use crate::drive::diagnose;
use crate::drive::outpatch::Outpatch;
use crate::drive::rest::Rest;
use crate::initramfs::READY;

/// How long a guest may take to its shell; ten times what it takes on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long one shell command may take unless the caller says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Printed, in angle brackets, by the shell that commands are typed to.
const SCRIPT_SHELL: &str = "script-shell";
/// Of every guest. On a busy machine a guest's clocksource watchdog complains in its log now and then, patched or not: without it
/// the log can be held against what it was.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tsc=reliable";
/// How lines begin in which a guest says that its host did not run it for a while. On a bed with more vCPUs than CPUs that is true
/// of guests that nobody patches or pauses as well; the last is of rt kernels, some of which say it while they boot: the console's
/// interrupt thread has the CPU for nearly a whole second of the guest's.
pub const STOLEN_TIME: [&str; 3] = [
    "hrtimer: interrupt took ",
    "sched: DL replenish lagged too much",
    "sched: RT throttling activated",
];
/// Prints the kernel's log without its time stamps.
const LOG: &str = r"dmesg -r | sed 's/^<[0-9]*>\[[^]]*\] //'";

/// As much memory, in MiB, as a guest needs that does nothing out of the ordinary.
pub const MEMORY_MIB: u32 = 512;

/// What to boot.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The `outpatch` binary.
    pub binary: PathBuf,
    /// What runs the guest: that binary, but for tests of the machine itself.
    pub vmm: PathBuf,
    /// A stock bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory in MiB; [`MEMORY_MIB`] for most.
    pub memory_mib: u32,
    /// More words for the kernel's command line.
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

/// What a guest's log was, to hold it against what it is later. The text stays in the guest: a serial console is slow.
#[derive(Clone, Debug)]
pub struct Log {
    lines: usize,
    sum: String,
}

impl Guest {
    /// Boots to the shell.
    ///
    /// # Errors
    /// When the guest does not reach its shell in time; with the console's last lines.
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
        guest.take_shell()?;
        Ok(guest)
    }

    /// Turns the console's shell for people into one that reads a script: BusyBox's interactive shell takes the end of a
    /// background job for the end of its input when the terminal does not echo.
    fn take_shell(&mut self) -> Result<()> {
        self.console.type_in(&format!(
            "stty -echo; exec sh -c \"printf '<%s>' {SCRIPT_SHELL}; exec sh /proc/self/fd/0\"\n"
        ))?;
        self.console
            .wait_for(&format!("<{SCRIPT_SHELL}>"), COMMAND_LIMIT)
            .context("starting the shell that the guest is driven by")?;
        Ok(())
    }

    /// Waits for the shell of another kernel, that this guest starts by itself.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn wait_for_next_boot(&mut self, limit: Duration) -> Result<()> {
        self.console.wait_for(READY, limit)?;
        self.take_shell()
    }

    /// The command line, bound to this guest.
    #[must_use]
    pub fn outpatch(&self) -> &Outpatch {
        &self.outpatch
    }

    /// The control socket, as control planes speak to it.
    #[must_use]
    pub fn rest(&self) -> Rest {
        Rest::new(&self.socket)
    }

    /// The control socket.
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
    /// When it fails or does not come back in time.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(command, COMMAND_LIMIT)
    }

    /// Like [`sh`](Self::sh) with a time limit of the caller's.
    ///
    /// # Errors
    /// When it fails or does not come back in time.
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
    /// When it does not come back in time.
    pub fn try_sh(&mut self, command: &str, limit: Duration) -> Result<(i32, String)> {
        self.commands += 1;
        let tag = format!("done-{}", self.commands);
        // The marker is put together by the guest, so that the echo of the command line does not contain it.
        self.console.type_in(&format!(
            "{{ {command}\n}} 2>&1; printf '\\n<%s:%d>\\n' {tag} $?\n"
        ))?;
        let before = self
            .console
            .wait_for(&format!("<{tag}:"), limit)
            .with_context(|| {
                let why = diagnose::explain(&self.outpatch);
                format!("running `{command}`, with {why}")
            })?;
        let status = self.console.wait_for(">", limit)?;
        let status = status
            .trim_end_matches('>')
            .parse()
            .with_context(|| format!("status {status:?}"))?;
        let text = before.strip_suffix(&format!("<{tag}:")).unwrap_or(&before);
        Ok((status, text.replace('\r', "").trim().to_owned()))
    }

    /// The kernel's log as it is now. What is compared are its texts: its time stamps are left out.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn dmesg(&mut self) -> Result<Log> {
        let said = self.sh(&format!(
            "{LOG} > /tmp/log; wc -l < /tmp/log; md5sum < /tmp/log; rm /tmp/log"
        ))?;
        let mut words = said.split_whitespace();
        let (Some(lines), Some(sum)) = (words.next(), words.next()) else {
            bail!("of its log, the guest says {said:?}");
        };
        Ok(Log {
            lines: lines.parse().context(said.clone())?,
            sum: sum.to_owned(),
        })
    }

    /// The lines that came to the log after `before`.
    ///
    /// # Errors
    /// When the lines of before are not there as they were.
    pub fn dmesg_since(&mut self, before: &Log) -> Result<Vec<String>> {
        let Log { lines, sum } = before;
        let text = self.sh(&format!(
            "{LOG} | head -n {lines} | md5sum; {LOG} | tail -n +{}",
            lines + 1
        ))?;
        let (now, new) = text.split_once('\n').unwrap_or((&text, ""));
        ensure!(
            now.split_whitespace().next() == Some(sum),
            "the first {lines} lines of the guest's log are not what they were: it is\n{}",
            self.sh(LOG)?
        );
        Ok(new.lines().map(str::to_owned).collect())
    }

    /// Nothing in the guest may show that it was patched: no taint, no warning, no lockup, no line in its log since `before` but
    /// those of [`STOLEN_TIME`], which are printed.
    ///
    /// # Errors
    /// When the guest's log or taint says otherwise.
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
            println!("the guest noticed that it did not run for a while: {stolen:?}");
        }
        ensure!(
            new.is_empty(),
            "new lines in the guest's log:\n{}",
            new.join("\n")
        );
        Ok(())
    }

    /// Asks the guest to power off and waits for the VMM's end.
    ///
    /// # Errors
    /// When the VMM does not end in time.
    pub fn poweroff(mut self) -> Result<ExitStatus> {
        self.console.type_in("poweroff -f\n")?;
        self.wait_end(Duration::from_secs(30))
    }

    /// Waits for the VMM's end.
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
            "the VMM did not end within {limit:?}; the console ended with:\n{}",
            tail(&self.console.text(), 2000)
        )
    }

    /// Whether the VMM is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.vmm.try_wait(), Ok(None))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

fn tail(text: &str, chars: usize) -> String {
    text.chars()
        .skip(text.chars().count().saturating_sub(chars))
        .collect()
}
