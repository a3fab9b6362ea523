//! Why a guest could not be started, or crashed. Each message says what was found and what to do.
//!
//! A message does not repeat its cause: print the whole chain of [`std::error::Error::source`].

use introspect::VcpuRegs;

use crate::boot::acpi::TablesTooLarge;
use crate::boot::bzimage::BootError;
use crate::boot::vcpu_state::RegisterError;
use crate::config::MAX_CPUS;
use crate::vm::error::{PauseError, VmError};
use crate::vm::regs::RegsReport;
use crate::vm::vcpu::{ExitReason, ExitedVcpu};

/// Why [`run_vm`](crate::run_vm) could not start a guest, or how the guest crashed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration has this number of vCPUs, which no guest can have.
    #[error("--cpus {0}: a guest has 1 to {MAX_CPUS} vCPUs")]
    Cpus(u32),
    /// The kernel, the initrd or the command line cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine could not be built.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The initial registers of the vCPUs could not be set.
    #[error(transparent)]
    Registers(#[from] RegisterError),
    /// The ACPI tables could not be written.
    #[error(transparent)]
    Acpi(#[from] TablesTooLarge),
    /// The code at the reset vector could not be written.
    #[error("cannot write the code at the reset vector")]
    ResetVector(#[from] vm_memory::GuestMemoryError),
    /// The host refused the named resource: a thread, a file descriptor, the terminal.
    #[error("cannot set up {0}")]
    Host(&'static str, #[source] std::io::Error),
    /// The event loop failed.
    #[error("the event loop failed")]
    EventLoop(#[source] event_manager::Error),
    /// The caller's `before_start` failed.
    #[error(transparent)]
    BeforeStart(Box<dyn std::error::Error + Send + Sync>),
    /// The vCPUs could not be started.
    #[error(transparent)]
    Vcpus(#[from] PauseError),
    /// The guest ended because a vCPU cannot continue.
    #[error("{}", crash_report(.0))]
    Crash(Box<ExitedVcpu>),
}

/// The reason in one line, then the registers.
fn crash_report(exited: &ExitedVcpu) -> String {
    let index = exited.index;
    let reason = match &exited.reason {
        ExitReason::TripleFault => format!("triple fault on vCPU {index}"),
        ExitReason::InternalError(Some((suberror, data))) => {
            let words: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
            let meaning = match suberror {
                1 => "it cannot emulate an instruction",
                2 => "an exception came while another was delivered",
                3 => "an interrupt was half delivered",
                4 => "an exit it does not know",
                _ => "no reason that we know",
            };
            format!(
                "KVM internal error on vCPU {index}: suberror {suberror} ({meaning}), data [{}]",
                words.join(", ")
            )
        }
        ExitReason::InternalError(None) => format!("KVM internal error on vCPU {index}"),
        ExitReason::FailEntry(reason) => {
            format!("the processor refused to run vCPU {index}: hardware reason {reason:#x}")
        }
        ExitReason::RunFailed(error) => format!("KVM_RUN of vCPU {index}: {error}"),
        ExitReason::Unexpected(exit) => {
            format!("vCPU {index} stopped for a reason that this machine does not handle: {exit}")
        }
        ExitReason::Panicked => {
            format!("the thread of vCPU {index} panicked: this is a bug in outpatch")
        }
        ExitReason::PowerOff | ExitReason::Reset => format!("vCPU {index} ended"),
    };
    match &exited.regs {
        Ok(regs) => format!(
            "{reason}\n{}{}",
            RegsReport(regs),
            reset_note(&exited.reason, regs)
        ),
        Err(unreadable) => format!("{reason}\n(its registers cannot be read: {unreadable})"),
    }
}

/// On AMD, KVM resets the vCPU when the guest shuts down
/// (`arch/x86/kvm/svm/svm.c: shutdown_interception`). The note says so, or the reader would take
/// the reset vector for the place of the fault.
fn reset_note(reason: &ExitReason, regs: &VcpuRegs) -> &'static str {
    if *reason == ExitReason::TripleFault && regs.rip == 0xfff0 && regs.cr3 == 0 {
        "(the host's KVM has reset the vCPU: these are not the registers of the fault)\n"
    } else {
        ""
    }
}
