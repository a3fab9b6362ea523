//! Reads one `task_struct`.
//!
//! This module knows which fields of a task are read and what they mean; it must not know the lists
//! that tasks are on.

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::memory::struct_reader::StructReader;
use crate::task::{PatchState, Task, TaskKind};

const PF_IDLE: u32 = 0x2;
const PF_IO_WORKER: u32 = 0x10;
const PF_USER_WORKER: u32 = 0x4000;
const PF_KTHREAD: u32 = 0x20_0000;

/// Reads tasks one at a time.
pub(crate) struct TaskReader<'a, 'm> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) memory: &'a KernelMemory<'m>,
    pub(crate) fields: StructReader<'a, 'm>,
    /// The flags of a [`TaskKind::Worker`]. `PF_USER_WORKER` counts only in a kernel that has it:
    /// the bit had another meaning before.
    worker: u32,
}

/// Bytes of a task's name that are read (`TASK_COMM_LEN` without its NUL).
const COMM: usize = 15;

impl<'a, 'm> TaskReader<'a, 'm> {
    /// A reader for one pause.
    pub(crate) fn new(kernel: &'a Kernel, memory: &'a KernelMemory<'m>) -> Self {
        let has_user_workers = kernel.symbols.contains("vhost_task_create");
        TaskReader {
            kernel,
            memory,
            fields: StructReader::new(memory, task_fields(kernel)),
            worker: if has_user_workers {
                PF_IO_WORKER | PF_USER_WORKER
            } else {
                PF_IO_WORKER
            },
        }
    }

    /// The task whose `task_struct` is at `addr`. Its `vcpu` is left `None`.
    pub(crate) fn read(&self, addr: Gva) -> Result<Task, ReadError> {
        let layout = &self.kernel.layout.task;
        let task = &self.fields;
        task.load(addr);
        let word = |field| task.field(addr, field);
        let flags = task.u32(layout.flags.of(addr))?;
        Ok(Task {
            addr,
            pid: task.i32(layout.pid.of(addr))?,
            tgid: task.i32(layout.tgid.of(addr))?,
            comm: task.cstr::<COMM>(layout.comm.of(addr))?,
            kind: self.kind(flags),
            state: word(layout.state)?,
            exit_state: task.u32(layout.exit_state.of(addr))?,
            flags,
            tif: word(layout.thread_flags)?,
            on_cpu: word(layout.on_cpu)? != 0,
            cpu: task.u32(layout.cpu.of(addr)).ok(),
            vcpu: None,
            patch_state: self.patch_state(addr)?,
            sp: Gva(word(layout.sp)?),
            stack: Gva(word(layout.stack)?),
        })
    }

    fn kind(&self, flags: u32) -> TaskKind {
        match flags {
            _ if flags & PF_IDLE != 0 => TaskKind::Idle,
            _ if flags & PF_KTHREAD != 0 => TaskKind::Kthread,
            _ if flags & self.worker != 0 => TaskKind::Worker,
            _ => TaskKind::User,
        }
    }

    fn patch_state(&self, addr: Gva) -> Result<Option<PatchState>, ReadError> {
        self.kernel
            .livepatch
            .as_ref()
            .map(|livepatch| {
                self.fields
                    .i32(livepatch.patch_state.of(addr))
                    .map(PatchState::from)
            })
            .transpose()
    }
}

/// Every field of a `task_struct` that is read. Those that show that a cached task is unchanged are
/// fewer and chosen for another reason: `task_list/fingerprint.rs` lists them.
fn task_fields(kernel: &Kernel) -> Vec<Field> {
    let task = &kernel.layout.task;
    let mut fields = vec![
        task.thread_flags,
        task.cpu,
        task.state,
        task.exit_state,
        task.stack,
        task.flags,
        task.on_cpu,
        task.tasks,
        task.thread_node,
        task.pid,
        task.tgid,
        task.comm,
        task.signal,
        task.sp,
    ];
    fields.extend(
        kernel
            .livepatch
            .iter()
            .map(|livepatch| livepatch.patch_state),
    );
    fields
}
