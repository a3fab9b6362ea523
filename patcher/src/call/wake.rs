//! Waking sleepers: only the guest's own scheduler can, so a routine of ours is run by the guest's own irq_work machinery.
//!
//! While the guest is paused an `irq_work` is put at the head of a CPU's `raised_list`, where the kernel's own producers put theirs
//! with a compare-and-exchange, and the CPU is sent the interrupt that makes it look (`kernel/irq_work.c: irq_work_run_list`). The
//! routine calls `wake_up_state(task, TASK_INTERRUPTIBLE)` for each task of a short list, which is what a fake signal does in the
//! kernel. Each task on the list is pinned by its reference count, taken while paused, and let go by the routine: it cannot be freed
//! in between. One list is out at a time.
//!
//! Knows the machinery; who is to be woken is the caller's affair.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, esi, qword_ptr, rbp, rbx, rdi, rsp};
use introspect::memory::{KernelMemory, ReadError};
use introspect::{Field, Gva, Kernel, Task, VcpuRegs};

use crate::error::PatchError;
use crate::guest::Guest;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{Allocation, PatchMemory, Request};
use crate::transition::signal::INTERRUPTIBLE;
use crate::x86::entry_stub::{self, EncodeError};

/// `IRQ_WORK_VECTOR` (`arch/x86/include/asm/irq_vectors.h`); proved by the guest's interrupt table before it is used.
const IRQ_WORK_VECTOR: u8 = 0xf6;
/// Tasks in one list: the routine runs with interrupts off, some microseconds a task.
pub const MOST: usize = 128;
/// Room for the routine.
const CODE_ROOM: u64 = 128;
/// Where the list begins in the data; the `irq_work` is before it.
const LIST: usize = 64;
/// One entry of the list: the task, and what `wake_up_state` answered.
const ENTRY: usize = 16;
/// A count that the kernel no longer trusts (`include/linux/refcount.h: REFCOUNT_SATURATED` and half way there).
const USAGE_LIMIT: u32 = 0x4000_0000;

/// What the machinery looks like in this kernel.
#[derive(Clone, Debug)]
pub struct IrqWorkInfo {
    wake_up_state: Gva,
    /// Frees a task whose last reference went.
    put: Gva,
    /// `task_struct.usage`.
    usage: Field,
    /// The per-CPU symbol of the list's head.
    raised_list: Gva,
    next: Field,
    flags: Field,
    func: Field,
    /// `CSD_TYPE_IRQ_WORK`, and with it `IRQ_WORK_PENDING | IRQ_WORK_BUSY`.
    done: u32,
    claimed: u32,
    /// The entry code of the interrupt.
    entry: Gva,
}

impl IrqWorkInfo {
    /// From a kernel's symbols and types.
    ///
    /// # Errors
    /// [`PatchError::Guest`] naming what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<IrqWorkInfo, PatchError> {
        let symbol = |name| kernel.symbols.address(name);
        let value = |name| kernel.btf.enum_value(name);
        let bits = |value: i64| u32::try_from(value).unwrap_or_default();
        let done = bits(value("CSD_TYPE_IRQ_WORK")?);
        Ok(IrqWorkInfo {
            wake_up_state: symbol("wake_up_state")?,
            put: symbol("__put_task_struct")?,
            usage: kernel.btf.field("task_struct.usage")?,
            raised_list: symbol("raised_list")?,
            next: kernel.btf.field("irq_work.node.llist.next")?,
            flags: kernel.btf.field("irq_work.node.u_flags")?,
            func: kernel.btf.field("irq_work.func")?,
            done,
            claimed: done | bits(value("IRQ_WORK_PENDING")?) | bits(value("IRQ_WORK_BUSY")?),
            entry: symbol("asm_sysvec_irq_work")?,
        })
    }
}

/// The routine and its list, placed in the guest.
#[derive(Debug)]
pub struct TaskWaker {
    facts: IrqWorkInfo,
    code: Allocation,
    code_bytes: Vec<u8>,
    data: Allocation,
    /// The guest has seen them: the list may be out.
    pub used: bool,
}

/// An interrupt that starts a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kick {
    /// To which vCPU.
    pub vcpu: u32,
    /// Which.
    pub vector: u8,
}

impl TaskWaker {
    /// Places the routine; the guest sees nothing of it yet.
    ///
    /// # Errors
    /// [`PatchError`], with nothing taken.
    pub fn prepare<M: Machine>(
        machine: &mut M,
        guest: &mut Guest,
        places: &mut PatchMemory,
        facts: &KernelInfo,
    ) -> Result<TaskWaker, PatchError> {
        let wake = IrqWorkInfo::new(&guest.kernel)?;
        let code_need = Request {
            len: CODE_ROOM,
            align: 64,
        };
        let code = places.take_code(machine, &guest.kernel, facts, code_need)?;
        let data_need = Request {
            len: (LIST + ENTRY * (MOST + 1)) as u64,
            align: 64,
        };
        // The data last: nothing after it can fail.
        let prepared = routine(code.range.start, &wake)
            .map_err(PatchError::from)
            .and_then(|code_bytes| {
                let data = places.take_data(machine, &guest.kernel, facts, data_need)?;
                Ok((code_bytes, data))
            });
        match prepared {
            Ok((code_bytes, data)) => {
                guest.unwinder.add_transient(code.range);
                Ok(TaskWaker {
                    facts: wake,
                    code,
                    code_bytes,
                    data,
                    used: false,
                })
            }
            Err(error) => {
                places.give_back(code);
                Err(error)
            }
        }
    }

    /// Whether the last list has been worked off.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_idle(&self, memory: &KernelMemory<'_>) -> Result<bool, ReadError> {
        let flags = self.facts.flags.of(self.data.range.start);
        Ok(!self.used || memory.u32(flags)? == self.facts.done)
    }

    /// Plans waking of `tasks`, the first [`MOST`] of them; `None` when no vCPU could do it now.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan(
        &self,
        look: &GuestView<'_>,
        places: &PatchMemory,
        tasks: &[&Task],
        plan: &mut WriteBatch,
    ) -> Result<Option<Kick>, ReadError> {
        let memory = &look.memory;
        let Some((vcpu, cpu)) = look.interruptible_vcpu() else {
            return Ok(None);
        };
        let head = look.kernel.percpu.address(self.facts.raised_list, cpu);
        let (Some(head), true) = (head, self.is_its_vector(memory, vcpu)?) else {
            return Ok(None);
        };
        let mut list = Vec::new();
        for task in tasks.iter().take(MOST) {
            let usage = self.facts.usage.of(task.addr);
            let count = memory.u32(usage)?;
            // On the lists it has a reference; what says otherwise is not touched.
            if (1..USAGE_LIMIT).contains(&count) {
                plan.write_kernel(memory, usage, &(count + 1).to_le_bytes())?;
                list.extend(task.addr.0.to_le_bytes());
                list.extend([0; 8]);
            }
        }
        if list.is_empty() {
            return Ok(None);
        }
        list.extend([0; ENTRY]);
        let work = self.data.range.start;
        let bytes = [self.work(memory.u64(head)?), list].concat();
        if !self.used {
            places.plan_fill(memory, self.code, &self.code_bytes, plan)?;
        }
        places.plan_fill(memory, self.data, &bytes, plan)?;
        plan.write_kernel(memory, head, &work.0.to_le_bytes())?;
        Ok(Some(Kick {
            vcpu: vcpu.index,
            vector: IRQ_WORK_VECTOR,
        }))
    }

    /// The `irq_work` as a producer leaves it on the list.
    fn work(&self, next: u64) -> Vec<u8> {
        let mut work = vec![0; LIST];
        let mut put = |field: Field, value: u64| {
            let at = usize::try_from(field.offset).unwrap_or(usize::MAX);
            let len = usize::try_from(field.size).unwrap_or_default().min(8);
            let room = at.checked_add(len).and_then(|end| work.get_mut(at..end));
            if let Some(room) = room {
                room.copy_from_slice(&value.to_le_bytes()[..len]);
            }
        };
        put(self.facts.next, next);
        put(self.facts.flags, self.facts.claimed.into());
        put(self.facts.func, self.code.range.start.0);
        work
    }

    /// The gate of the vector leads to the entry code of irq_work.
    fn is_its_vector(&self, memory: &KernelMemory<'_>, vcpu: &VcpuRegs) -> Result<bool, ReadError> {
        if vcpu.fred_config.is_some() {
            // FRED has no gates; the vector is the same number.
            return Ok(true);
        }
        let gate = Gva(vcpu.idt_base).add(16 * u64::from(IRQ_WORK_VECTOR));
        let (low, high) = (memory.u64(gate)?, memory.u64(gate.add(8))?);
        let offset = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        Ok(Gva(offset) == self.facts.entry)
    }
}

/// The routine, `void (*func)(struct irq_work *)`, at `at`: called on the interrupt stack with interrupts off.
fn routine(at: Gva, facts: &IrqWorkInfo) -> Result<Vec<u8>, EncodeError> {
    let targets = [facts.wake_up_state, facts.put];
    entry_stub::fitted(at, CODE_ROOM, targets, || assemble(at, facts))
}

/// `ret` is a plain one: what runs once for a rare event gains nothing from the kernel's return thunk.
fn assemble(at: Gva, facts: &IrqWorkInfo) -> Result<Vec<u8>, IcedError> {
    let usage = u32::try_from(facts.usage.offset).unwrap_or(u32::MAX);
    let mut a = CodeAssembler::new(64)?;
    let [mut again, mut kept, mut end] = [a.create_label(), a.create_label(), a.create_label()];
    a.endbr64()?;
    a.push(rbx)?;
    a.push(rbp)?;
    a.sub(rsp, 8)?;
    a.lea(rbx, qword_ptr(rdi + LIST))?;
    a.set_label(&mut again)?;
    a.mov(rbp, qword_ptr(rbx))?;
    a.test(rbp, rbp)?;
    a.je(end)?;
    a.mov(rdi, rbp)?;
    a.mov(esi, i32::try_from(INTERRUPTIBLE).unwrap_or(1))?;
    a.call(facts.wake_up_state.0)?;
    a.mov(dword_ptr(rbx + 8), eax)?;
    a.mov(rdi, rbp)?;
    a.lock().dec(dword_ptr(rbp + usage))?;
    a.jne(kept)?;
    a.call(facts.put.0)?;
    a.set_label(&mut kept)?;
    a.add(rbx, i32::try_from(ENTRY).unwrap_or(16))?;
    a.jmp(again)?;
    a.set_label(&mut end)?;
    a.add(rsp, 8)?;
    a.pop(rbp)?;
    a.pop(rbx)?;
    a.ret()?;
    a.int3()?;
    a.assemble(at.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn facts() -> IrqWorkInfo {
        let field = |offset, size| Field { offset, size };
        IrqWorkInfo {
            wake_up_state: Gva(0xffff_ffff_8110_0000),
            put: Gva(0xffff_ffff_8120_0000),
            usage: field(40, 4),
            raised_list: Gva(0x2c3c8),
            next: field(0, 8),
            flags: field(8, 4),
            func: field(16, 8),
            done: 0x20,
            claimed: 0x23,
            entry: Gva(0xffff_ffff_81c0_0fb0),
        }
    }

    #[test]
    fn the_routine_wakes_and_lets_go_of_each_task() {
        let at = Gva(0xffff_ffff_81a0_0000);
        let code = routine(at, &facts()).unwrap();
        let mut formatter = IntelFormatter::new();
        let listing: Vec<String> = Decoder::with_ip(64, &code, at.0, DecoderOptions::NONE)
            .iter()
            .map(|instruction| {
                let mut text = String::new();
                formatter.format(&instruction, &mut text);
                text
            })
            .collect();
        assert_eq!(
            listing,
            [
                "endbr64",
                "push rbx",
                "push rbp",
                "sub rsp,8",
                "lea rbx,[rdi+40h]",
                "mov rbp,[rbx]",
                "test rbp,rbp",
                "je short 0FFFFFFFF81A0003Ah",
                "mov rdi,rbp",
                "mov esi,1",
                "call 0FFFFFFFF81100000h",
                "mov [rbx+8],eax",
                "mov rdi,rbp",
                "lock dec dword ptr [rbp+28h]",
                "jne short 0FFFFFFFF81A00034h",
                "call 0FFFFFFFF81200000h",
                "add rbx,10h",
                "jmp short 0FFFFFFFF81A0000Eh",
                "add rsp,8",
                "pop rbp",
                "pop rbx",
                "ret",
                "int3",
            ]
        );
    }

    #[test]
    fn a_routine_out_of_reach_is_refused() {
        let far = Gva(0xffff_8880_0000_0000);
        assert!(routine(far, &facts()).is_err());
    }
}
