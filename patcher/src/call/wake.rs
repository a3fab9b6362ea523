//! [`TaskWaker`]: wakes sleeping tasks of the guest.
//!
//! Only the guest's own scheduler can wake a task, so the guest runs a routine for it, as an
//! [`irq_work`](crate::call::irq_work). The routine calls `wake_up_state(task, TASK_INTERRUPTIBLE)`
//! for each task of a short list, as a fake signal does in the kernel. Each task on the list is
//! pinned: its reference count is incremented while the guest is paused, and the routine drops that
//! reference, so the task cannot be freed in between. One list is queued at a time.
//!
//! This module knows the routine and its list; it must not know which tasks are to be woken, or
//! why.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, esi, qword_ptr, rbp, rbx, rdi, rsp};
use introspect::task::TASK_INTERRUPTIBLE;
use introspect::{Field, Gva, Kernel, Task};
use introspect::{KernelMemory, ReadError};

use crate::call::irq_work::{IrqWorkInfo, Kick, WORK_SIZE};
use crate::error::PatchError;
use crate::guest::Guest;
use crate::guest::kernel_info::KernelInfo;
use crate::guest::view::GuestView;
use crate::machine::Machine;
use crate::memory::write_batch::WriteBatch;
use crate::memory::{Allocation, PatchMemory, Request, Usage};
use crate::x86::{self, EncodeError};

/// The most tasks in one list: the routine runs with interrupts off and takes some microseconds for
/// each task.
pub const MAX_TASKS: usize = 128;
/// Bytes that are reserved for the routine.
const MAX_CODE: u64 = 128;
/// Offset of the list in the data; the `irq_work` is before it.
const LIST: usize = WORK_SIZE;
/// Bytes of one entry of the list: the task, and what `wake_up_state` returned.
const ENTRY_SIZE: usize = 16;
/// A reference count from which the kernel no longer trusts it: half way to
/// `include/linux/refcount.h: REFCOUNT_SATURATED`.
const USAGE_LIMIT: u32 = 0x4000_0000;

/// The functions and fields of a kernel that the routine uses.
#[derive(Clone, Debug)]
struct WakeInfo {
    wake_up_state: Gva,
    /// `__put_task_struct`, which frees a task whose last reference is gone.
    put_task_struct: Gva,
    /// `task_struct.usage`.
    usage: Field,
}

impl WakeInfo {
    fn new(kernel: &Kernel) -> Result<WakeInfo, PatchError> {
        Ok(WakeInfo {
            wake_up_state: kernel.symbols.address("wake_up_state")?,
            put_task_struct: kernel.symbols.address("__put_task_struct")?,
            usage: kernel.btf.field("task_struct.usage")?,
        })
    }
}

/// The routine and its list, placed in the guest.
#[derive(Debug)]
pub struct TaskWaker {
    irq_work: IrqWorkInfo,
    info: WakeInfo,
    code: Allocation,
    code_bytes: Vec<u8>,
    data: Allocation,
    /// Whether the guest has seen them: a list may be queued.
    pub used: bool,
}

impl TaskWaker {
    /// Allocates memory for the routine and assembles it; writes nothing.
    ///
    /// # Errors
    /// [`PatchError`], with nothing allocated.
    pub fn prepare<M: Machine>(
        machine: &mut M,
        guest: &mut Guest,
        patch_memory: &mut PatchMemory,
        info: &KernelInfo,
    ) -> Result<TaskWaker, PatchError> {
        let irq_work = IrqWorkInfo::new(&guest.kernel)?;
        let wake = WakeInfo::new(&guest.kernel)?;
        let code_request = Request {
            len: MAX_CODE,
            align: 64,
        };
        let table = info.fixmap_table;
        let kernel = &guest.kernel;
        let code = patch_memory.allocate(machine, kernel, table, Usage::Code, code_request)?;
        let data_request = Request {
            len: (LIST + ENTRY_SIZE * (MAX_TASKS + 1)) as u64,
            align: 64,
        };
        // The data is allocated last: nothing after it can fail.
        let prepared = routine(code.range.start, &wake)
            .map_err(PatchError::from)
            .and_then(|code_bytes| {
                let data =
                    patch_memory.allocate(machine, kernel, table, Usage::Data, data_request)?;
                Ok((code_bytes, data))
            });
        match prepared {
            Ok((code_bytes, data)) => {
                guest.unwinder.add_transient(code.range);
                Ok(TaskWaker {
                    irq_work,
                    info: wake,
                    code,
                    code_bytes,
                    data,
                    used: false,
                })
            }
            Err(error) => {
                patch_memory.free(code);
                Err(error)
            }
        }
    }

    /// Whether the routine is done with the last list.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn is_idle(&self, memory: &KernelMemory<'_>) -> Result<bool, ReadError> {
        Ok(!self.used || self.irq_work.is_done(memory, self.data.range.start)?)
    }

    /// Plans the writes that wake the first [`MAX_TASKS`] of `tasks`, and returns the interrupt to
    /// send; `None` when no vCPU can take it now.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn plan(
        &self,
        view: &GuestView<'_>,
        patch_memory: &PatchMemory,
        tasks: &[&Task],
        writes: &mut WriteBatch,
    ) -> Result<Option<Kick>, ReadError> {
        let memory = &view.memory;
        let Some((vcpu, cpu)) = view.interruptible_vcpu() else {
            return Ok(None);
        };
        let head = self.irq_work.list_head(view.kernel, cpu);
        let (Some(head), Some(kick)) = (head, self.irq_work.kick(memory, vcpu)?) else {
            return Ok(None);
        };
        let mut list = Vec::new();
        for task in tasks.iter().take(MAX_TASKS) {
            let usage = self.info.usage.of(task.addr);
            let count = memory.u32(usage)?;
            // A task on the kernel's lists has a reference; one whose count says otherwise is
            // skipped.
            if (1..USAGE_LIMIT).contains(&count) {
                writes.write_kernel(memory, usage, &(count + 1).to_le_bytes())?;
                list.extend(task.addr.0.to_le_bytes());
                list.extend([0; 8]);
            }
        }
        if list.is_empty() {
            return Ok(None);
        }
        list.extend([0; ENTRY_SIZE]);
        let work = self.data.range.start;
        let first = memory.u64(head)?;
        let queued = self.irq_work.queued(self.code.range.start, first);
        let bytes = [queued, list].concat();
        if !self.used {
            patch_memory.plan_fill(self.code, &self.code_bytes, writes);
        }
        patch_memory.plan_fill(self.data, &bytes, writes);
        writes.write_kernel(memory, head, &work.0.to_le_bytes())?;
        Ok(Some(kick))
    }
}

/// The routine, `void (*func)(struct irq_work *)`, for address `at`. It is called on the interrupt
/// stack with interrupts off.
fn routine(at: Gva, info: &WakeInfo) -> Result<Vec<u8>, EncodeError> {
    let targets = [info.wake_up_state, info.put_task_struct];
    x86::assemble_within(at, MAX_CODE, targets, || assemble(at, info))
}

/// Returns with a plain `ret`: code that runs once for a rare event gains nothing from the kernel's
/// return thunk.
fn assemble(at: Gva, info: &WakeInfo) -> Result<Vec<u8>, IcedError> {
    let usage = u32::try_from(info.usage.offset).unwrap_or(u32::MAX);
    let mut a = CodeAssembler::new(64)?;
    let [mut next, mut referenced, mut end] =
        [a.create_label(), a.create_label(), a.create_label()];
    a.endbr64()?;
    a.push(rbx)?;
    a.push(rbp)?;
    a.sub(rsp, 8)?;
    a.lea(rbx, qword_ptr(rdi + LIST))?;
    a.set_label(&mut next)?;
    a.mov(rbp, qword_ptr(rbx))?;
    a.test(rbp, rbp)?;
    a.je(end)?;
    a.mov(rdi, rbp)?;
    a.mov(esi, i32::try_from(TASK_INTERRUPTIBLE).unwrap_or(1))?;
    a.call(info.wake_up_state.0)?;
    a.mov(dword_ptr(rbx + 8), eax)?;
    a.mov(rdi, rbp)?;
    a.lock().dec(dword_ptr(rbp + usage))?;
    a.jne(referenced)?;
    a.call(info.put_task_struct.0)?;
    a.set_label(&mut referenced)?;
    a.add(rbx, i32::try_from(ENTRY_SIZE).unwrap_or(16))?;
    a.jmp(next)?;
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

    fn info() -> WakeInfo {
        WakeInfo {
            wake_up_state: Gva(0xffff_ffff_8110_0000),
            put_task_struct: Gva(0xffff_ffff_8120_0000),
            usage: Field {
                offset: 40,
                size: 4,
            },
        }
    }

    #[test]
    fn the_routine_wakes_and_releases_each_task() {
        let at = Gva(0xffff_ffff_81a0_0000);
        let code = routine(at, &info()).unwrap();
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
        assert!(routine(far, &info()).is_err());
    }
}
