//! The guest's `irq_work`: how a function is queued on a CPU, and which interrupt runs it.
//!
//! While the guest is paused, a `struct irq_work` is put at the head of a CPU's `raised_list`,
//! where the kernel's own producers put theirs with a compare-and-exchange; the CPU is then sent
//! the interrupt that makes it run the list (`kernel/irq_work.c: irq_work_run_list`).
//!
//! This module knows the structure and the list; it must not know what the function does.

use introspect::{Field, Gva, Kernel, VcpuRegs};
use introspect::{KernelMemory, ReadError};

use crate::error::PatchError;

/// `IRQ_WORK_VECTOR` (`arch/x86/include/asm/irq_vectors.h`); checked against the guest's interrupt
/// table before each use.
const IRQ_WORK_VECTOR: u8 = 0xf6;
/// Bytes that are reserved for a `struct irq_work`.
pub const WORK_SIZE: usize = 64;

/// The fields, bits and symbols of a kernel's `irq_work`.
#[derive(Clone, Debug)]
pub struct IrqWorkInfo {
    /// The per-CPU symbol of the list's head.
    raised_list: Gva,
    next: Field,
    flags: Field,
    func: Field,
    /// `CSD_TYPE_IRQ_WORK`: the flags after the work has run.
    done: u32,
    /// The same with `IRQ_WORK_PENDING | IRQ_WORK_BUSY`: the flags that a producer sets.
    claimed: u32,
    /// The entry code of the interrupt.
    entry: Gva,
}

/// An interrupt that makes a vCPU run its `irq_work` list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kick {
    /// Index of the vCPU to send it to.
    pub vcpu: u32,
    /// The interrupt vector.
    pub vector: u8,
}

impl IrqWorkInfo {
    /// Resolves them from a kernel's symbols and types.
    ///
    /// # Errors
    /// [`PatchError::Guest`] that names what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<IrqWorkInfo, PatchError> {
        let symbol = |name| kernel.symbols.address(name);
        let value = |name| kernel.btf.enum_value(name);
        let bits = |value: i64| u32::try_from(value).unwrap_or_default();
        let done = bits(value("CSD_TYPE_IRQ_WORK")?);
        Ok(IrqWorkInfo {
            raised_list: symbol("raised_list")?,
            next: kernel.btf.field("irq_work.node.llist.next")?,
            flags: kernel.btf.field("irq_work.node.u_flags")?,
            func: kernel.btf.field("irq_work.func")?,
            done,
            claimed: done | bits(value("IRQ_WORK_PENDING")?) | bits(value("IRQ_WORK_BUSY")?),
            entry: symbol("asm_sysvec_irq_work")?,
        })
    }

    /// The address of the head of `cpu`'s list; `None` when the kernel has no such CPU.
    #[must_use]
    pub fn list_head(&self, kernel: &Kernel, cpu: u32) -> Option<Gva> {
        kernel.percpu.address(self.raised_list, cpu)
    }

    /// Whether the `irq_work` at `work`, which was queued before, has run.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_done(&self, memory: &KernelMemory<'_>, work: Gva) -> Result<bool, ReadError> {
        Ok(memory.u32(self.flags.of(work))? == self.done)
    }

    /// The bytes of an `irq_work` that calls `func`, as a producer puts it on a list whose first
    /// entry was `next`.
    #[must_use]
    pub fn queued(&self, func: Gva, next: u64) -> Vec<u8> {
        let mut work = vec![0; WORK_SIZE];
        let mut put = |field: Field, value: u64| {
            let at = usize::try_from(field.offset).unwrap_or(usize::MAX);
            let len = usize::try_from(field.size).unwrap_or_default().min(8);
            let bytes = at.checked_add(len).and_then(|end| work.get_mut(at..end));
            if let Some(bytes) = bytes {
                bytes.copy_from_slice(&value.to_le_bytes()[..len]);
            }
        };
        put(self.next, next);
        put(self.flags, self.claimed.into());
        put(self.func, func.0);
        work
    }

    /// The interrupt for `vcpu`; `None` when the gate of its vector does not lead to the entry code
    /// of `irq_work`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn kick(
        &self,
        memory: &KernelMemory<'_>,
        vcpu: &VcpuRegs,
    ) -> Result<Option<Kick>, ReadError> {
        // FRED has no gates; the vector is the same number.
        let leads_there = vcpu.fred_config.is_some() || self.gate(memory, vcpu)? == self.entry;
        Ok(leads_there.then_some(Kick {
            vcpu: vcpu.index,
            vector: IRQ_WORK_VECTOR,
        }))
    }

    fn gate(&self, memory: &KernelMemory<'_>, vcpu: &VcpuRegs) -> Result<Gva, ReadError> {
        let gate = Gva(vcpu.idt_base).add(16 * u64::from(IRQ_WORK_VECTOR));
        let (low, high) = (memory.u64(gate)?, memory.u64(gate.add(8))?);
        Ok(Gva(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32))
    }
}
