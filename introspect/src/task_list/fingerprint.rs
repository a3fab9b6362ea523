//! The fingerprint of a task: bytes that show that it is as it was read, although the guest ran in
//! between.
//!
//! It consists of some fields of the `task_struct`. They are read before the rest of the task, and
//! again in the pause. Reading them takes time, and so does reading the rest, so one reading before
//! the rest is not enough: it may see the task off its CPU just before it is switched in, and its
//! counters just after it was switched out. Two equal readings are enough. Whatever `on_cpu` was in
//! the second, the counters were read before it, in the first. A task that ran later and is off its
//! CPU in the pause was switched out after that and counted (`kernel/sched/core.c: __schedule`
//! counts before `finish_task` clears `on_cpu`), and counters only rise. So a task that was off its
//! CPU in the second reading, and has the same fingerprint in the pause, has not run since the
//! second reading: what was read of it after that, its stack included, is still true. What was read
//! of a task that was on a CPU, or that changed between the two readings, must not be used later.
//!
//! Other tasks can change flags and states of a sleeping task: those fields are in the fingerprint
//! by value. This module knows which fields make a fingerprint; it must not know what they mean.

use std::cell::Ref;

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::{Field, KernelMemory};
use crate::memory::struct_reader::StructReader;

/// Reads fingerprints, one task at a time.
pub(crate) struct Fingerprint<'a, 'm> {
    first: StructReader<'a, 'm>,
    second: StructReader<'a, 'm>,
}

impl<'a, 'm> Fingerprint<'a, 'm> {
    pub(crate) fn new(kernel: &Kernel, memory: &'a KernelMemory<'m>) -> Self {
        let fields = fingerprint_fields(kernel);
        Fingerprint {
            first: StructReader::exact(memory, fields.iter().copied()),
            second: StructReader::exact(memory, fields),
        }
    }

    /// The length of one fingerprint in bytes.
    pub(crate) fn len(&self) -> usize {
        self.first.len()
    }

    /// Sets `same` for each task of `addrs` that certainly has its fingerprint of `bytes`, where
    /// the fingerprints stand in the order of `addrs`. A task for which it is not set may have it
    /// or not. Faster than a [`read`](Self::read) of each.
    pub(crate) fn compare(&self, addrs: &[Gva], bytes: &[u8], same: &mut [bool]) {
        self.first.compare(addrs, bytes, same);
    }

    /// The fingerprint of the task at `addr`; `None` if it cannot be read.
    pub(crate) fn read(&self, addr: Gva) -> Option<Ref<'_, [u8]>> {
        self.first.load(addr);
        self.first.bytes(addr)
    }

    /// The second reading: whether the task at `addr` has the fingerprint that
    /// [`read`](Self::read) returned last. If so, that fingerprint vouches for what is read of the
    /// task after this call.
    pub(crate) fn is_unchanged(&self, addr: Gva) -> bool {
        self.second.load(addr);
        match (self.first.bytes(addr), self.second.bytes(addr)) {
            (Some(first), Some(second)) => *first == *second,
            _ => false,
        }
    }
}

/// The fields that make a fingerprint: the start time and the counters of context switches, which
/// show that it is the same task and that it has not run, and the fields that other tasks change.
fn fingerprint_fields(kernel: &Kernel) -> Vec<Field> {
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
