//! What proves of a task that it is still as it was read, though the guest ran in between.
//!
//! Some fields of its `task_struct` are gathered before the rest is read, and gathered again in the pause. A gathering is not made at
//! one moment, nor is the reading after it, so one is not enough: a task may be seen off its CPU just before it is switched in, and
//! its counters just after it was switched out. Two that are equal are. Whatever `on_cpu` was in the second, the counters
//! were read before, in the first. A task that ran later and is off its CPU in the pause was switched out after that and counted
//! (`kernel/sched/core.c: __schedule` counts before `finish_task` clears `on_cpu`), and counters only rise. So one that was off its CPU in
//! the second, and is the same in the pause, has not run from the second on: what was read of it since, its stack too, is
//! what it left. Of one that was on a CPU, or changed between the two, nothing that was read is to be believed later.
//!
//! What others change of a sleeping task, flags and states, is proved by value. Knows which fields prove; must not know what they say.

use std::cell::Ref;

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::{Field, KernelMemory};
use crate::memory::struct_reader::StructReader;

/// Gathers what proves a task, one task at a time.
pub(crate) struct Fingerprint<'a, 'm> {
    first: StructReader<'a, 'm>,
    second: StructReader<'a, 'm>,
}

impl<'a, 'm> Fingerprint<'a, 'm> {
    pub(crate) fn new(kernel: &Kernel, memory: &'a KernelMemory<'m>) -> Self {
        let fields = fields(kernel);
        Fingerprint {
            first: StructReader::exact(memory, fields.iter().copied()),
            second: StructReader::exact(memory, fields),
        }
    }

    /// Bytes that prove one task.
    pub(crate) fn len(&self) -> usize {
        self.first.len()
    }

    /// Sets `same` for tasks that are certainly proved by the bytes that stand for them: sooner than to [`gather`](Self::gather) those of
    /// one after the other. Of the others nothing is known.
    pub(crate) fn compare(&self, addrs: &[Gva], bytes: &[u8], same: &mut [bool]) {
        self.first.compare(addrs, bytes, same);
    }

    /// Gathers those of the task at `addr`; none if they cannot be read.
    pub(crate) fn gather(&self, addr: Gva) -> Option<Ref<'_, [u8]>> {
        self.first.hold(addr);
        self.first.of(addr)
    }

    /// Gathers them again: whether the task was still the same. What is read of it from now on, [`gather`](Self::gather) proves then.
    pub(crate) fn holds(&self, addr: Gva) -> bool {
        self.second.hold(addr);
        match (self.first.of(addr), self.second.of(addr)) {
            (Some(first), Some(second)) => *first == *second,
            _ => false,
        }
    }
}

/// What shows that a task is still the same and has not run: the time of its birth and the counters of
/// its switches, of which no two are the same; and what others than itself change of it.
fn fields(kernel: &Kernel) -> Vec<Field> {
    let task = &kernel.layout.task;
    let mut fields = vec![
        task.thread_flags,
        task.cpu,
        task.state,
        task.stack,
        task.flags,
        task.on_cpu,
        task.nvcsw,
        task.nivcsw,
    ];
    fields.extend(task.start_time);
    fields.extend(
        kernel
            .livepatch
            .iter()
            .map(|livepatch| livepatch.patch_state),
    );
    fields
}
