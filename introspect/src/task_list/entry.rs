//! One entry of the [task cache](crate::task_list::TaskCache): a task with its stack.
//!
//! This module knows when a stack that was walked may still be taken for the task's; it must not
//! know the lists that tasks are on.

use std::{borrow::Cow, cell::OnceCell, num::NonZeroU64};

use crate::addr::Gva;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::task::reader::TaskReader;
use crate::task::{PatchState, Task};
use crate::unwind::Unwinder;
use crate::unwind::stack::{Stack, Verdict};
use crate::vcpu::VcpuRegs;

/// A stack of more frames is not cached.
const MAX_FRAMES: usize = 32;

/// A task, and its stack once it was walked.
#[derive(Clone, Debug)]
pub struct CachedTask {
    /// The task as it was read last.
    pub task: Task,
    pub(crate) stack: OnceCell<Stack>,
    /// Whether a stack that is walked is cached.
    pub(crate) caches_stack: bool,
    pub(crate) links: ListLinks,
}

/// The part of an entry that a pause needs when nothing has changed: fetching the whole entry of
/// each task would take too long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TaskSummary {
    pub(crate) addr: Gva,
    pub(crate) patch_state: Option<PatchState>,
    /// What the caller knows of the task's stack; removed when the stack may have changed.
    pub(crate) tag: Option<NonZeroU64>,
    /// The task may have run while it was read, so no fingerprint vouches for what was read: the
    /// next refresh reads it again.
    pub(crate) stale: bool,
}

/// The links out of a task: to the next thread of its process, to the next process, and to the
/// `signal_struct`, which holds the head of the thread list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListLinks {
    pub(crate) thread: Gva,
    pub(crate) process: Gva,
    pub(crate) signal: Gva,
}

impl ListLinks {
    /// The links of the task at `addr`. Costs no read of the guest if `reader` has just read it.
    pub(crate) fn read(reader: &TaskReader<'_, '_>, addr: Gva) -> Result<ListLinks, ReadError> {
        let layout = &reader.kernel.layout;
        let next = |list| reader.fields.pointer(layout.list_next.of(list));
        Ok(ListLinks {
            thread: next(layout.task.thread_node.of(addr))?,
            process: next(layout.task.tasks.of(addr))?,
            signal: reader.fields.pointer(layout.task.signal.of(addr))?,
        })
    }
}

impl CachedTask {
    pub(crate) fn read(reader: &TaskReader<'_, '_>, addr: Gva) -> Result<CachedTask, ReadError> {
        let task = reader.read(addr)?;
        Ok(CachedTask {
            links: ListLinks::read(reader, addr)?,
            task,
            stack: OnceCell::new(),
            caches_stack: false,
        })
    }

    /// Moves the entry out. What is left has no name and no stack, and must not be used.
    pub(crate) fn move_out(&mut self) -> CachedTask {
        CachedTask {
            task: Task {
                comm: std::mem::take(&mut self.task.comm),
                ..self.task
            },
            stack: std::mem::take(&mut self.stack),
            ..*self
        }
    }

    /// The summary of this entry, without a tag. `stable`: the fingerprint was equal in two
    /// readings before the task was read
    /// ([`is_unchanged`](crate::task_list::fingerprint::Fingerprint::is_unchanged)).
    pub(crate) fn summary(&self, stable: bool) -> TaskSummary {
        TaskSummary {
            addr: self.task.addr,
            patch_state: self.task.patch_state,
            tag: None,
            stale: !stable || self.task.on_cpu,
        }
    }

    /// Whether its stack is cached.
    #[must_use]
    pub fn is_walked(&self) -> bool {
        self.stack.get().is_some()
    }

    /// Its stack, if it is cached.
    #[must_use]
    pub fn cached_stack(&self) -> Option<&Stack> {
        self.stack.get()
    }

    /// Its kernel stack ([`Unwinder::stack`]), from the cache or walked now. `regs` are those of
    /// the vCPU that runs the task.
    pub fn stack(
        &self,
        unwinder: &Unwinder,
        memory: &KernelMemory<'_>,
        regs: Option<&VcpuRegs>,
    ) -> Cow<'_, Stack> {
        if let Some(cached) = self.stack.get() {
            return Cow::Borrowed(cached);
        }
        let walked = unwinder.stack(memory, &self.task, regs);
        if self.caches(&walked) {
            Cow::Borrowed(self.stack.get_or_init(|| walked))
        } else {
            Cow::Owned(walked)
        }
    }

    /// Walks and caches the stack while the guest runs.
    pub(crate) fn prewalk(&self, unwinder: &Unwinder, memory: &KernelMemory<'_>) {
        if self.is_walked() {
            return;
        }
        let walked = unwinder.prewalk(memory, &self.task);
        if self.caches(&walked) {
            let _ = self.stack.set(walked);
        }
    }

    fn caches(&self, walked: &Stack) -> bool {
        self.caches_stack && walked.frames.len() <= MAX_FRAMES
    }

    /// Prepares an entry whose task is unchanged for another pause. Drops a stack that may be
    /// wrong: what a running task does shows in no counter, and an unreliable stack may have been
    /// something else.
    pub(crate) fn reuse(&mut self) {
        let unreliable = |stack: &Stack| stack.verdict != Verdict::Reliable;
        let changes = self.may_change_unseen() || self.task.vcpu.is_some();
        if changes || self.stack.get().is_some_and(unreliable) {
            self.drop_stack();
        }
        self.task.vcpu = None;
    }

    /// Whether its stack may change although its fingerprint does not.
    pub(crate) fn may_change_unseen(&self) -> bool {
        self.task.on_cpu || self.task.exit_state != 0
    }

    pub(crate) fn drop_stack(&mut self) {
        self.stack = OnceCell::new();
    }
}
