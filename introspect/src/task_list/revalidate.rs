//! Making sure of many tasks that are known: each is as it was, or is read again.
//!
//! This is what a pause does for every task of the guest, so it is spread over threads: the guest's own processors have nothing else
//! to do then. Knows what proves a task; must not know how the lists are walked.

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::parallel;
use crate::task::reader::TaskReader;
use crate::task_list::entry::{CachedTask, TaskSummary};
use crate::task_list::error::TasksError;
use crate::task_list::fingerprint::Fingerprint;

/// So many tasks are compared in one go, and are what a thread takes next.
const PART: usize = 256;
/// So many tasks take several times as long as starting a thread for them.
const WORTH_A_THREAD: usize = 2048;

/// Some tasks as they were seen: of each its brief, the bytes that prove it, and the rest.
pub(crate) struct CachedTasks<'s> {
    pub(crate) briefs: &'s mut [TaskSummary],
    pub(crate) raw: &'s mut [u8],
    pub(crate) seen: &'s mut [CachedTask],
}

impl CachedTasks<'_> {
    /// Makes sure of all, each proved by `len` bytes. False: one of them is no longer where it was in the lists, or cannot be read.
    pub(crate) fn renew(
        mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        len: usize,
    ) -> Result<bool, TasksError> {
        let (phys, space) = (memory.phys(), memory.space());
        let threads = parallel::threads(self.briefs.len(), WORTH_A_THREAD);
        type Done = Result<bool, TasksError>;
        let done = parallel::over::<_, Done>(threads, self.parts(PART, len), |parts| {
            // Each thread remembers translations of its own.
            let memory = KernelMemory::new(phys, space);
            let reader = TaskReader::new(kernel, &memory);
            let proof = Fingerprint::new(kernel, &memory);
            for part in parts {
                if !part.renew_here(&reader, &proof)? {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        for part in done {
            // Of a thread that ended in a panic nothing is known.
            if !part.unwrap_or(Ok(false))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The same in parts of so many tasks.
    fn parts<'p>(&'p mut self, tasks: usize, len: usize) -> impl Iterator<Item = CachedTasks<'p>> {
        let each = self.briefs.chunks_mut(tasks);
        let each = each.zip(self.raw.chunks_mut(tasks.saturating_mul(len)));
        let each = each.zip(self.seen.chunks_mut(tasks));
        each.map(|((briefs, raw), seen)| CachedTasks { briefs, raw, seen })
    }

    fn renew_here(
        self,
        reader: &TaskReader<'_, '_>,
        proof: &Fingerprint<'_, '_>,
    ) -> Result<bool, TasksError> {
        let addrs: Vec<Gva> = self.briefs.iter().map(|brief| brief.addr).collect();
        let mut same = vec![false; addrs.len()];
        proof.compare(&addrs, self.raw, &mut same);
        let each = self.briefs.iter_mut().zip(self.raw.chunks_mut(proof.len()));
        for (((brief, before), seen), same) in each.zip(self.seen).zip(same) {
            if same && !brief.anew {
                settle(brief, seen);
            } else if !renew_one(reader, proof, brief, before, seen)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// One that proved to be as it was.
fn settle(brief: &TaskSummary, seen: &mut CachedTask) {
    if brief.mark.is_none() {
        seen.settle();
    }
}

/// Makes sure of one that is known, or reads it again. False: it is no longer where it was in the lists.
fn renew_one(
    reader: &TaskReader<'_, '_>,
    proof: &Fingerprint<'_, '_>,
    brief: &mut TaskSummary,
    before: &mut [u8],
    seen: &mut CachedTask,
) -> Result<bool, TasksError> {
    let Some(now) = proof.gather(brief.addr) else {
        return Ok(false);
    };
    if *now == *before && !brief.anew {
        settle(brief, seen);
        return Ok(true);
    }
    let still = proof.holds(brief.addr);
    let mut fresh = CachedTask::read(reader, brief.addr)?;
    if fresh.links != seen.links {
        return Ok(false);
    }
    // Only now: as long as the two differ, nobody takes the old stack for the new one.
    before.copy_from_slice(&now);
    fresh.kept = true;
    *brief = fresh.brief(still);
    *seen = fresh;
    Ok(true)
}
