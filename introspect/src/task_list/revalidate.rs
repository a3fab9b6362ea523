//! Revalidates many cached tasks: each is unchanged, or is read again.
//!
//! A pause does this for every task of the guest, so several threads share it: the processors that
//! run the guest have nothing else to do then. This module knows that a fingerprint shows whether a
//! task is unchanged; it must not know how the lists are walked.

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::parallel;
use crate::task::reader::TaskReader;
use crate::task_list::entry::{CachedTask, TaskSummary};
use crate::task_list::error::TasksError;
use crate::task_list::fingerprint::Fingerprint;

/// Tasks that are compared in one go; a thread takes this many at a time.
const BATCH: usize = 256;
/// The least number of tasks for a thread: they take several times as long as starting it.
const WORTH_A_THREAD: usize = 2048;

/// Entries of the cache: of each its summary, its fingerprint, and the rest.
pub(crate) struct CachedTasks<'s> {
    pub(crate) summaries: &'s mut [TaskSummary],
    pub(crate) fingerprints: &'s mut [u8],
    pub(crate) entries: &'s mut [CachedTask],
}

impl CachedTasks<'_> {
    /// Revalidates all, each against its fingerprint of `len` bytes. False: a task is no longer
    /// where it was in the lists, or cannot be read.
    pub(crate) fn revalidate(
        mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        len: usize,
    ) -> Result<bool, TasksError> {
        let (phys, space) = (memory.phys(), memory.space());
        let threads = parallel::threads(self.summaries.len(), WORTH_A_THREAD);
        type Done = Result<bool, TasksError>;
        let done = parallel::for_each::<_, Done>(threads, self.batches(BATCH, len), |batches| {
            // Each thread caches translations of its own.
            let memory = KernelMemory::new(phys, space);
            let reader = TaskReader::new(kernel, &memory);
            let fingerprint = Fingerprint::new(kernel, &memory);
            for batch in batches {
                if !batch.revalidate_batch(&reader, &fingerprint)? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        for thread in done {
            // A thread that panicked has no result.
            if !thread.unwrap_or(Ok(false))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The same entries in batches of `tasks`.
    fn batches<'p>(
        &'p mut self,
        tasks: usize,
        len: usize,
    ) -> impl Iterator<Item = CachedTasks<'p>> {
        let each = self.summaries.chunks_mut(tasks);
        let each = each.zip(self.fingerprints.chunks_mut(tasks.saturating_mul(len)));
        let each = each.zip(self.entries.chunks_mut(tasks));
        each.map(|((summaries, fingerprints), entries)| CachedTasks {
            summaries,
            fingerprints,
            entries,
        })
    }

    fn revalidate_batch(
        self,
        reader: &TaskReader<'_, '_>,
        fingerprint: &Fingerprint<'_, '_>,
    ) -> Result<bool, TasksError> {
        let addrs: Vec<Gva> = self.summaries.iter().map(|summary| summary.addr).collect();
        let mut same = vec![false; addrs.len()];
        fingerprint.compare(&addrs, self.fingerprints, &mut same);
        let fingerprints = self.fingerprints.chunks_mut(fingerprint.len());
        let each = self.summaries.iter_mut().zip(fingerprints);
        for (((summary, before), entry), same) in each.zip(self.entries).zip(same) {
            if same && !summary.stale {
                reuse(summary, entry);
            } else if !revalidate_one(reader, fingerprint, summary, before, entry)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Reuses an entry whose task is unchanged. A tagged one needs nothing: its stack is reliable, and
/// no vCPU runs its task.
fn reuse(summary: &TaskSummary, entry: &mut CachedTask) {
    if summary.tag.is_none() {
        entry.reuse();
    }
}

/// Revalidates one entry, or reads its task again. False: the task is no longer where it was in the
/// lists, or cannot be read.
fn revalidate_one(
    reader: &TaskReader<'_, '_>,
    fingerprint: &Fingerprint<'_, '_>,
    summary: &mut TaskSummary,
    before: &mut [u8],
    entry: &mut CachedTask,
) -> Result<bool, TasksError> {
    let Some(now) = fingerprint.read(summary.addr) else {
        return Ok(false);
    };
    if *now == *before && !summary.stale {
        reuse(summary, entry);
        return Ok(true);
    }
    let stable = fingerprint.is_unchanged(summary.addr);
    let mut fresh = CachedTask::read(reader, summary.addr)?;
    if fresh.links != entry.links {
        return Ok(false);
    }
    // Not before this point: as long as the two differ, the old stack is not taken for the new one.
    before.copy_from_slice(&now);
    fresh.caches_stack = true;
    *summary = fresh.summary(stable);
    *entry = fresh;
    Ok(true)
}
