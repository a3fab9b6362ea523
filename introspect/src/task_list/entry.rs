//! One task as a [`survey`](crate::task_list::cache) knows it, with its stack.
//!
//! Knows when a stack that was walked may be taken for the task's still; must not know the lists that tasks are on.

use std::{borrow::Cow, cell::OnceCell, num::NonZeroU64};

use crate::addr::Gva;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::task::reader::TaskReader;
use crate::task::{PatchState, Task};
use crate::unwind::Unwinder;
use crate::unwind::stack::{Stack, Verdict};
use crate::vcpu::VcpuRegs;

/// A stack of more frames is not kept.
const MOST_FRAMES: usize = 32;

/// A task, and its stack once somebody asked for it.
#[derive(Clone, Debug)]
pub struct CachedTask {
    /// The task.
    pub task: Task,
    pub(crate) stack: OnceCell<Stack>,
    pub(crate) kept: bool,
    pub(crate) links: ListLinks,
}

/// Of a task, what a look needs where nothing has changed: a pause is too short to fetch the rest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TaskSummary {
    pub(crate) addr: Gva,
    pub(crate) patch_state: Option<PatchState>,
    /// What the caller found out about its stack: while this is here, that is the same.
    pub(crate) mark: Option<NonZeroU64>,
    /// It may have run while it was read: nothing proves what was, and the next look reads it anew.
    pub(crate) anew: bool,
}

/// Where the lists go on from a task: its process's threads, the next process, and where the head of the threads is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListLinks {
    pub(crate) thread: Gva,
    pub(crate) process: Gva,
    pub(crate) signal: Gva,
}

impl ListLinks {
    /// Of the task at `addr`, which is read together where the reader has taken it.
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
            kept: false,
        })
    }

    /// All of it; what stays behind is of no use.
    pub(crate) fn take(&mut self) -> CachedTask {
        CachedTask {
            task: Task {
                comm: std::mem::take(&mut self.task.comm),
                ..self.task
            },
            stack: std::mem::take(&mut self.stack),
            ..*self
        }
    }

    /// `still`: it was the same just before it was read ([`Fingerprint::holds`](crate::task_list::fingerprint::Proof::holds)).
    pub(crate) fn brief(&self, still: bool) -> TaskSummary {
        TaskSummary {
            addr: self.task.addr,
            patch_state: self.task.patch_state,
            mark: None,
            anew: !still || self.task.on_cpu,
        }
    }

    /// Whether its stack is known from before.
    #[must_use]
    pub fn is_walked(&self) -> bool {
        self.stack.get().is_some()
    }

    /// Its stack, if that is known from before.
    #[must_use]
    pub fn known_stack(&self) -> Option<&Stack> {
        self.stack.get()
    }

    /// Its kernel stack ([`Unwinder::stack`]), walked once while it stays the same; `regs` are those of the vCPU that runs it.
    pub fn stack(
        &self,
        unwinder: &Unwinder,
        memory: &KernelMemory<'_>,
        regs: Option<&VcpuRegs>,
    ) -> Cow<'_, Stack> {
        if let Some(known) = self.stack.get() {
            return Cow::Borrowed(known);
        }
        let walked = unwinder.stack(memory, &self.task, regs);
        if self.kept && walked.frames.len() <= MOST_FRAMES {
            Cow::Borrowed(self.stack.get_or_init(|| walked))
        } else {
            Cow::Owned(walked)
        }
    }

    /// Before another look at a task of which nothing has changed: what a running one does shows in no counter, and what could not
    /// be relied on may have been something else than its stack.
    pub(crate) fn settle(&mut self) {
        let unreliable = |stack: &Stack| stack.verdict != Verdict::Reliable;
        let moves = self.moves() || self.task.vcpu.is_some();
        if moves || self.stack.get().is_some_and(unreliable) {
            self.forget();
        }
        self.task.vcpu = None;
    }

    /// Its stack may change though nothing that proves it does.
    pub(crate) fn moves(&self) -> bool {
        self.task.on_cpu || self.task.exit_state != 0
    }

    pub(crate) fn forget(&mut self) {
        self.stack = OnceCell::new();
    }
}
