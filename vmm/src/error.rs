//! What can go wrong before and while a guest runs; each message says what was found and what to do.

use introspect::VcpuRegs;

use crate::boot::acpi::TablesTooLarge;
use crate::boot::bzimage::BootError;
use crate::boot::vcpu_state::RegisterError;
use crate::config::MAX_CPUS;
use crate::vm::error::{PauseError, VmError};
use crate::vm::regs::Dump;
use crate::vm::vcpu::{ExitReason, ExitedVcpu};

/// Why a guest could not be started, or how it ended when not of its own will.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A number of vCPUs that no guest may have.
    #[error("--cpus {0}: a guest has 1 to {MAX_CPUS} vCPUs")]
    Cpus(u32),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine could not be built.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The vCPUs' registers.
    #[error(transparent)]
    Registers(#[from] RegisterError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] TablesTooLarge),
    /// The reset vector.
    #[error("the reset vector")]
    ResetVector(#[from] vm_memory::GuestMemoryError),
    /// Threads, file descriptors, the terminal.
    #[error("{0}")]
    Host(&'static str, #[source] std::io::Error),
    /// The event loop.
    #[error("event loop")]
    EventLoop(#[source] event_manager::Error),
    /// What the caller wanted to have beside the guest (its control socket, say).
    #[error(transparent)]
    Beside(Box<dyn std::error::Error + Send + Sync>),
    /// The vCPUs could not be started.
    #[error(transparent)]
    Vcpus(#[from] PauseError),
    /// The guest ended because a vCPU cannot go on.
    #[error("{}", died(.0))]
    Died(Box<ExitedVcpu>),
}

fn died(ended: &ExitedVcpu) -> String {
    let index = ended.index;
    let why = match &ended.end {
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
            format!("vCPU {index} stopped for a reason that this machine has no use for: {exit}")
        }
        ExitReason::Panicked => {
            format!("the thread of vCPU {index} panicked: this is a bug in outpatch")
        }
        ExitReason::PowerOff | ExitReason::Reset => format!("vCPU {index} ended"),
    };
    match &ended.regs {
        Ok(regs) => format!("{why}\n{}{}", Dump(regs), after_reset(&ended.end, regs)),
        Err(unreadable) => format!("{why}\n(its registers cannot be read: {unreadable})"),
    }
}

/// On AMD, KVM resets the vCPU when the guest shuts down (`arch/x86/kvm/svm/svm.c: shutdown_interception`): say so, or the
/// reader takes the reset vector for where the guest was.
fn after_reset(end: &ExitReason, regs: &VcpuRegs) -> &'static str {
    if *end == ExitReason::TripleFault && regs.rip == 0xfff0 && regs.cr3 == 0 {
        "(the host's KVM has reset the vCPU: these are not the registers of the fault)\n"
    } else {
        ""
    }
}
