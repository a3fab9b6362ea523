//! The registers of a stopped vCPU: read through KVM for introspection, and printed for a crash
//! report.
//!
//! This module knows KVM's register calls; it must not know vCPU threads or what the guest runs.

use std::fmt;

use introspect::VcpuRegs;
use introspect::x86::{CR4_FRED, CR4_VMXE, EFER_SVME};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;

const MSR_IA32_FRED_CONFIG: u32 = 0x1d4;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Why the registers of a vCPU cannot be read. They reach the patcher as text, so each message
/// names its cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegsError {
    /// The named KVM call failed.
    #[error("vCPU {vcpu}: {call}: {error}")]
    Kvm {
        /// Index of the vCPU.
        vcpu: u32,
        /// The call.
        call: &'static str,
        /// KVM's error.
        error: kvm_ioctls::Error,
    },
    /// KVM does not read an MSR.
    #[error("vCPU {vcpu}: KVM_GET_MSRS: MSR {msr:#x} cannot be read")]
    Msr {
        /// Index of the vCPU.
        vcpu: u32,
        /// Index of the MSR.
        msr: u32,
    },
    /// The registers are those in the middle of an I/O instruction.
    #[error("vCPU {0}: an I/O instruction does not complete")]
    IoPending(u32),
    /// The vCPU has not run yet.
    #[error("vCPU {0} has not started")]
    NotStarted(u32),
    /// The vCPU's thread panicked.
    #[error("the vCPU's thread panicked")]
    Panicked,
}

/// Reads the registers of vCPU `index`, which must be outside `KVM_RUN` with no I/O pending.
///
/// # Errors
/// [`RegsError::Kvm`], [`RegsError::Msr`].
pub fn capture(vcpu: &VcpuFd, index: u32) -> Result<VcpuRegs, RegsError> {
    let failed = |call| {
        move |error| RegsError::Kvm {
            vcpu: index,
            call,
            error,
        }
    };
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let mp_state = vcpu
        .get_mp_state()
        .map_err(failed("KVM_GET_MP_STATE"))?
        .mp_state;
    let [lstar, kernel_gs_base] = read_msrs(vcpu, index, [MSR_LSTAR, MSR_KERNEL_GS_BASE])?;
    let fred_config = if sregs.cr4 & CR4_FRED == 0 {
        None
    } else {
        let [config] = read_msrs(vcpu, index, [MSR_IA32_FRED_CONFIG])?;
        Some(config)
    };
    // KVM_GET_NESTED_STATE copies pages, so it is called only for a guest that has virtualization
    // switched on.
    let nested =
        (sregs.efer & EFER_SVME != 0 || sregs.cr4 & CR4_VMXE != 0) && in_nested_guest(vcpu);
    let mut captured = VcpuRegs::default();
    captured.index = index;
    captured.rax = regs.rax;
    captured.rbx = regs.rbx;
    captured.rcx = regs.rcx;
    captured.rdx = regs.rdx;
    captured.rsi = regs.rsi;
    captured.rdi = regs.rdi;
    captured.rsp = regs.rsp;
    captured.rbp = regs.rbp;
    captured.r8 = regs.r8;
    captured.r9 = regs.r9;
    captured.r10 = regs.r10;
    captured.r11 = regs.r11;
    captured.r12 = regs.r12;
    captured.r13 = regs.r13;
    captured.r14 = regs.r14;
    captured.r15 = regs.r15;
    captured.rip = regs.rip;
    captured.rflags = regs.rflags;
    // KVM keeps the CPL in SS.DPL for both vendors, even when SS itself is null.
    captured.cpl = sregs.ss.dpl & 3;
    captured.cr0 = sregs.cr0;
    captured.cr3 = sregs.cr3;
    captured.cr4 = sregs.cr4;
    captured.efer = sregs.efer;
    captured.fs_base = sregs.fs.base;
    captured.gs_base = sregs.gs.base;
    captured.kernel_gs_base = kernel_gs_base;
    captured.lstar = lstar;
    captured.idt_base = sregs.idt.base;
    captured.idt_limit = sregs.idt.limit;
    captured.fred_config = fred_config;
    captured.online = mp_state == KVM_MP_STATE_RUNNABLE || mp_state == KVM_MP_STATE_HALTED;
    captured.halted = mp_state == KVM_MP_STATE_HALTED;
    captured.foreign = nested || events.smi.smm != 0;
    Ok(captured)
}

fn read_msrs<const N: usize>(
    vcpu: &VcpuFd,
    index: u32,
    msrs: [u32; N],
) -> Result<[u64; N], RegsError> {
    let refused = |msr| RegsError::Msr { vcpu: index, msr };
    let entries = msrs.map(|index| kvm_msr_entry {
        index,
        ..Default::default()
    });
    let mut read =
        Msrs::from_entries(&entries).map_err(|_| refused(msrs.first().copied().unwrap_or(0)))?;
    let count = vcpu.get_msrs(&mut read).map_err(|error| RegsError::Kvm {
        vcpu: index,
        call: "KVM_GET_MSRS",
        error,
    })?;
    let mut values = [0; N];
    for (value, entry) in values.iter_mut().zip(read.as_slice()) {
        *value = entry.data;
    }
    match msrs.get(count) {
        None => Ok(values),
        Some(msr) => Err(refused(*msr)),
    }
}

/// Whether the vCPU is in a nested guest. If that cannot be read, it counts as being in one.
fn in_nested_guest(vcpu: &VcpuFd) -> bool {
    let mut state = KvmNestedStateBuffer::empty();
    match vcpu.nested_state(&mut state) {
        Ok(_) => u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0,
        Err(_) => true,
    }
}

/// Prints registers for a crash report.
#[derive(Debug)]
pub struct RegsReport<'a>(pub &'a VcpuRegs);

impl fmt::Display for RegsReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = self.0;
        writeln!(
            f,
            "vCPU {} cpl {} rip {:016x} rflags {:016x} rsp {:016x}",
            r.index, r.cpl, r.rip, r.rflags, r.rsp
        )?;
        for row in [
            [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
            ],
            [
                ("rsi", r.rsi),
                ("rdi", r.rdi),
                ("rbp", r.rbp),
                ("r8 ", r.r8),
            ],
            [
                ("r9 ", r.r9),
                ("r10", r.r10),
                ("r11", r.r11),
                ("r12", r.r12),
            ],
            [
                ("r13", r.r13),
                ("r14", r.r14),
                ("r15", r.r15),
                ("efr", r.efer),
            ],
            [
                ("cr0", r.cr0),
                ("cr3", r.cr3),
                ("cr4", r.cr4),
                ("idt", r.idt_base),
            ],
            [
                ("fs ", r.fs_base),
                ("gs ", r.gs_base),
                ("kgs", r.kernel_gs_base),
                ("lst", r.lstar),
            ],
        ] {
            let cells = row.map(|(name, value)| format!("{name} {value:016x}"));
            writeln!(f, "  {}", cells.join("  "))?;
        }
        Ok(())
    }
}
