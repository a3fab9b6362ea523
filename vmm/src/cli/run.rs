//! `outpatch run`: starts a guest on this terminal.

use std::path::PathBuf;
use std::process::ExitCode;

use vmm::api::{ControlSocket, Controller, Limits, Server};
use vmm::{ExitKind, VmConfig, parse_size};

/// Boot a guest with its serial console on this terminal; Ctrl-A x stops it.
///
/// In the background of a terminal (`&`, `timeout`) the guest runs without input; after `fg` the
/// terminal is its console.
///
/// Exit status: 0 when the guest powered off or reset itself (it is not started again), or was
/// stopped by Ctrl-A x or through the control socket; 128 + N when signal N stopped it; 1 when it
/// could not be started, or ended with a triple fault or an internal error of KVM; 2 for wrong
/// arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The kernel: a bzImage, such as a distribution's /boot/vmlinuz-*.
    #[arg(long, value_name = "BZIMAGE")]
    kernel: PathBuf,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(
        long,
        value_name = "STR",
        default_value = "console=ttyS0",
        allow_hyphen_values = true
    )]
    append: String,
    /// The number of vCPUs, 1 to 8.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// The size of guest memory: 512M, 1G, 768MiB; a plain number is in MiB.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// Create the control socket at this path, for `outpatch ps`, `apply` and the other commands.
    #[arg(long, value_name = "PATH", env = "OUTPATCH_SOCKET")]
    socket: Option<PathBuf>,
}

/// Runs the guest until it ends.
///
/// # Errors
/// When it could not be started, or ended by a fault.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // First, as this refusal costs nothing to detect.
    let socket = args
        .socket
        .map(|path| ControlSocket::claim(&path))
        .transpose()?;
    let config = VmConfig {
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.append,
        cpus: args.cpus,
        memory: args.memory,
    };
    let kind = vmm::run_vm(&config, |vm| {
        socket
            .map(|socket| Server::start(socket, Controller::new(vm.clone()), Limits::default()))
            .transpose()
    })?;
    Ok(match kind {
        ExitKind::PowerOff | ExitKind::Reset | ExitKind::Stopped => ExitCode::SUCCESS,
        ExitKind::Signal(signal) => {
            ExitCode::from(u8::try_from(signal).map_or(255, |signal| signal.saturating_add(128)))
        }
    })
}
