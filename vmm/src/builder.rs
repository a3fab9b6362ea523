//! Builds a guest from its [`VmConfig`]: the VM with its memory, what the guest finds there when it
//! starts, the registers of its vCPUs, its devices and buses, and its vCPU threads, all paused.
//!
//! This module knows the parts and how they are connected; it must not know the event loop, signals
//! or the terminal, and starts nothing. A device that is added to the machine is added in
//! [`buses`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::acpi;
use crate::boot::bzimage::{Initrd, Kernel};
use crate::boot::reset_vector;
use crate::boot::vcpu_state;
use crate::config::{MAX_CPUS, VmConfig};
use crate::console::output::{Output, OutputWriter};
use crate::devices::legacy::cmos::{self, Cmos};
use crate::devices::legacy::i8042::{self, I8042};
use crate::devices::legacy::power::{self, Power};
use crate::devices::legacy::serial::{self, Com1};
use crate::devices::{Bus, Buses};
use crate::error::RunError;
use crate::vm::console_stall;
use crate::vm::kvm_run::ImmediateExit;
use crate::vm::shared::{Shared, VmState};
use crate::vm::vcpu::{ExitReporter, ExitedVcpu};
use crate::vm::vcpu_set::Vcpus;
use crate::vm::{Vm, check_serving, open_kvm};

/// A guest that is built and has not run yet. The fields are in the order in which they are
/// dropped: the vCPU threads end before the output that they print to is closed.
#[derive(Debug)]
pub struct BuiltVm {
    /// The machine, paused once by [`Vcpus::start`].
    pub shared: Arc<Shared>,
    /// The console, for its input.
    pub com1: Arc<Mutex<Com1<Output>>>,
    /// Written to by the console when the guest has taken all its input.
    pub input_taken: EventFd,
    /// Written to when the guest shall be stopped; a duplicate of [`Shared::stop`].
    pub stop: EventFd,
    /// Reports of vCPUs that have exited.
    pub exits: Receiver<ExitedVcpu>,
    /// Written to after each report in `exits`.
    pub exit_event: EventFd,
    /// The console's output.
    pub output: Output,
    /// The thread that writes the console's output.
    _writer: OutputWriter,
}

/// Builds the guest of `config`, with its console's output on our standard output.
///
/// # Errors
/// [`RunError`]: a part of the configuration is wrong, or the host lacks or refuses something.
pub fn build(config: &VmConfig) -> Result<BuiltVm, RunError> {
    let cpus = u8::try_from(config.cpus)
        .ok()
        .filter(|cpus| (1..=MAX_CPUS).contains(&u32::from(*cpus)))
        .ok_or(RunError::Cpus(config.cpus))?;
    // First, as a wrong file costs nothing to detect.
    let mut kernel = Kernel::open(&config.kernel)?;
    kernel.check_memory(config.memory)?;
    let initrd = config.initrd.as_deref().map(Initrd::open).transpose()?;
    let kvm = open_kvm()?;
    check_serving()?;
    let (vm, vcpus) = Vm::new(&kvm, config.memory, cpus)?;
    let entry = load_guest(&vm, &mut kernel, initrd, &config.cmdline)?;
    set_registers(&vcpus, entry)?;
    assemble(vm, vcpus, duplicate_stream(io::stdout())?)
}

/// Connects `vm` and its `vcpus`, whose memory and registers are set, with devices and threads.
/// The console's output goes to `stdout`.
///
/// # Errors
/// [`RunError`]: the host refuses something.
pub fn assemble(
    vm: Vm,
    vcpus: Vec<(VcpuFd, ImmediateExit)>,
    stdout: OwnedFd,
) -> Result<BuiltVm, RunError> {
    let (output, writer) =
        Output::start(stdout).map_err(|e| RunError::Host("the console thread", e))?;
    let input_taken = eventfd()?;
    let irq = vm.irq_line(serial::GSI)?;
    let com1 = Com1::new(irq, output.clone(), duplicate_event(&input_taken)?)
        .map_err(|e| RunError::Host("the console's timer", e))?;
    let com1 = Arc::new(Mutex::new(com1));
    let buses = Arc::new(buses(com1.clone()));
    let (reports, exits) = channel();
    let exit_event = eventfd()?;
    let reporter = ExitReporter {
        reports,
        event: duplicate_event(&exit_event)?,
    };
    let vcpus = Vcpus::start(vcpus, &buses, &output, &reporter)
        .map_err(|e| RunError::Host("the vCPU threads", e))?;
    let stop = eventfd()?;
    let shared = Arc::new(Shared {
        vcpus,
        vm,
        state: Mutex::new(VmState::Running),
        stop: duplicate_event(&stop)?,
    });
    console_stall::start(&shared, &output)
        .map_err(|e| RunError::Host("the console's second thread", e))?;
    Ok(BuiltVm {
        shared,
        com1,
        input_taken,
        stop,
        exits,
        exit_event,
        output,
        _writer: writer,
    })
}

/// Writes to guest memory all that the guest finds there when it starts; the kernel's entry point.
fn load_guest(
    vm: &Vm,
    kernel: &mut Kernel,
    initrd: Option<Initrd>,
    cmdline: &str,
) -> Result<GuestAddress, RunError> {
    let ram = vm.memory().ram();
    let rsdp = acpi::write_tables(ram, vm.cpus())?;
    reset_vector::write(ram)?;
    let entry = kernel.load(ram, initrd, cmdline, rsdp)?;
    vcpu_state::write_boot_tables(ram)?;
    Ok(entry)
}

/// Sets the registers of all vCPUs; the first is the boot processor, at `entry`.
fn set_registers(vcpus: &[(VcpuFd, ImmediateExit)], entry: GuestAddress) -> Result<(), RunError> {
    for (vcpu, _) in vcpus {
        vcpu_state::set_msrs(vcpu)?;
    }
    if let Some((boot_vcpu, _)) = vcpus.first() {
        vcpu_state::set_boot_state(boot_vcpu, entry)?;
    }
    Ok(())
}

fn buses(com1: Arc<Mutex<Com1<Output>>>) -> Buses {
    let pio = Bus::default()
        .with(serial::PORT.into(), serial::PORTS.into(), com1)
        .with(i8042::PORT, i8042::PORTS, Arc::new(Mutex::new(I8042)))
        .with(
            cmos::PORT.into(),
            cmos::PORTS,
            Arc::new(Mutex::new(Cmos::default())),
        )
        .with(
            power::PORT.into(),
            power::PORTS,
            Arc::new(Mutex::new(Power)),
        );
    Buses {
        pio,
        mmio: Bus::default(),
    }
}

fn eventfd() -> Result<EventFd, RunError> {
    EventFd::new(libc::EFD_NONBLOCK).map_err(|e| RunError::Host("an eventfd", e))
}

/// Another descriptor of the same eventfd.
pub fn duplicate_event(event: &EventFd) -> Result<EventFd, RunError> {
    event
        .try_clone()
        .map_err(|e| RunError::Host("an eventfd", e))
}

/// Another descriptor of one of our standard streams.
pub fn duplicate_stream(stream: impl AsFd) -> Result<OwnedFd, RunError> {
    stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| RunError::Host("standard input or output", e))
}
