//! The registers of a vCPU: as the patcher wants them of a stopped one, and as a person wants them of one that died.

use std::fmt;

use introspect::VcpuRegs;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;

const MSR_IA32_FRED_CONFIG: u32 = 0x1d4;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
const CR4_VMXE: u64 = 1 << 13;
const CR4_FRED: u64 = 1 << 32;
const EFER_SVME: u64 = 1 << 12;

/// Reads the registers of vCPU `index`, which is outside `KVM_RUN` and has no I/O pending.
///
/// # Errors
/// Which of KVM's calls failed, and how.
pub fn capture(vcpu: &VcpuFd, index: u32) -> Result<VcpuRegs, String> {
    let said =
        |what: &'static str| move |e: kvm_ioctls::Error| format!("vCPU {index}: {what}: {e}");
    let regs = vcpu.get_regs().map_err(said("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(said("KVM_GET_SREGS"))?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(said("KVM_GET_VCPU_EVENTS"))?;
    let mp_state = vcpu
        .get_mp_state()
        .map_err(said("KVM_GET_MP_STATE"))?
        .mp_state;
    let [lstar, kernel_gs_base] = read_msrs(vcpu, [MSR_LSTAR, MSR_KERNEL_GS_BASE])
        .map_err(|e| format!("vCPU {index}: {e}"))?;
    let fred_config = if sregs.cr4 & CR4_FRED == 0 {
        None
    } else {
        let [config] =
            read_msrs(vcpu, [MSR_IA32_FRED_CONFIG]).map_err(|e| format!("vCPU {index}: {e}"))?;
        Some(config)
    };
    // Asking for the nested state copies pages of it, so only a guest that switched virtualization on is asked.
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
    // KVM keeps the CPL in SS.DPL on both vendors, also where SS itself is null.
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
    captured.foreign = nested || events.smi.smm != 0;
    Ok(captured)
}

fn read_msrs<const N: usize>(vcpu: &VcpuFd, indices: [u32; N]) -> Result<[u64; N], String> {
    let entries = indices.map(|index| kvm_msr_entry {
        index,
        ..Default::default()
    });
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| format!("KVM_GET_MSRS: {e:?}"))?;
    let count = vcpu
        .get_msrs(&mut msrs)
        .map_err(|e| format!("KVM_GET_MSRS: {e}"))?;
    let mut values = [0; N];
    for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
        *value = entry.data;
    }
    match indices.get(count) {
        None => Ok(values),
        Some(refused) => Err(format!("KVM_GET_MSRS: MSR {refused:#x} cannot be read")),
    }
}

/// Whether the vCPU is in its own guest at this moment; a vCPU that cannot tell is taken to be.
fn in_nested_guest(vcpu: &VcpuFd) -> bool {
    let mut state = KvmNestedStateBuffer::empty();
    match vcpu.nested_state(&mut state) {
        Ok(_) => u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0,
        Err(_) => true,
    }
}

/// Registers as a person reads them in a crash report.
#[derive(Debug)]
pub struct Dump<'a>(pub &'a VcpuRegs);

impl fmt::Display for Dump<'_> {
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
