//! A cache of all tasks and their stacks: a pause reads again only what may have changed.
//!
//! The guest stands still during a pause, so as much as possible is read before it.
//! [`TaskCache::prewalk`] lists tasks and walks stacks while the guest runs, and
//! [`TaskCache::refresh`] in the pause only revalidates. A cached task is valid while its
//! [fingerprint](crate::task_list::fingerprint) is the same: a few fields of its `task_struct` that
//! say when it was created, how often it was switched out, that it is on no CPU, and what other
//! tasks may change of it. Only the task itself changes its other fields and the frames of its
//! stack, by running. (Another task can change its name.) That no task has joined the lists and
//! none has left, the kernel's own counts show.
//!
//! This module knows the lists that tasks are on; it must not know what is on their stacks.

mod unlisted;

use std::{collections::HashMap, num::NonZeroU64};

use crate::addr::{Gva, GvaRange};
use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task::reader::TaskReader;
use crate::task::{PatchState, Task};
use crate::task_list::counts::{TaskCounts, check_count};
use crate::task_list::entry::{CachedTask, ListLinks, TaskSummary};
use crate::task_list::error::{MAX_TASKS, TasksError};
use crate::task_list::fingerprint::Fingerprint;
use crate::task_list::on_cpu;
use crate::task_list::revalidate::CachedTasks;
use crate::unwind::Unwinder;
use crate::unwind::stack::{Frame, Stack};
use crate::vcpu::VcpuRegs;

/// With more tasks, or more bytes of fingerprints, nothing is cached: a bound on the memory that is
/// held for one guest.
const MAX_CACHED: usize = 1 << 15;
const MAX_FINGERPRINT_BYTES: usize = 32 << 20;

/// All tasks of a guest, as of the last refresh.
#[derive(Clone, Debug)]
pub struct TaskCache {
    entries: Vec<CachedTask>,
    /// The summary of each entry.
    summaries: Vec<TaskSummary>,
    /// The index in `entries` of each task.
    index: HashMap<Gva, usize>,
    /// The indices of the tasks that a vCPU runs.
    running: Vec<usize>,
    /// This many of `entries`, the first ones, are on the lists. The others are idle tasks, or have
    /// left the lists.
    listed: usize,
    /// The fingerprints of the listed tasks, one after the other; empty when nothing is cached.
    fingerprints: Vec<u8>,
    /// Whether anything is cached for the next refresh.
    caches: bool,
    /// The kernel's counts from before the lists were walked.
    counts: Option<TaskCounts>,
    /// The generation of the unwinder's code map by which the stacks were walked.
    generation: u64,
}

impl Default for TaskCache {
    fn default() -> TaskCache {
        TaskCache::new()
    }
}

impl TaskCache {
    /// An empty cache.
    #[must_use]
    pub fn new() -> TaskCache {
        TaskCache {
            entries: Vec::new(),
            summaries: Vec::new(),
            index: HashMap::new(),
            running: Vec::new(),
            listed: 0,
            fingerprints: Vec::new(),
            caches: true,
            counts: None,
            generation: 0,
        }
    }

    /// One that caches nothing for the next refresh.
    pub(crate) fn uncached() -> TaskCache {
        TaskCache {
            caches: false,
            ..TaskCache::new()
        }
    }

    /// An empty cache with this one's settings.
    fn emptied(&self) -> TaskCache {
        TaskCache {
            caches: self.caches,
            generation: self.generation,
            ..TaskCache::new()
        }
    }

    /// Lists tasks and walks the stacks of sleeping ones while the guest runs. The result is a hint
    /// only: the next [`refresh`](Self::refresh) revalidates every entry. What cannot be read now
    /// is left to it.
    pub fn prewalk(&mut self, kernel: &Kernel, unwinder: &Unwinder, memory: &KernelMemory<'_>) {
        if self.refresh(kernel, unwinder, memory, &[]).is_err() {
            return;
        }
        for entry in &self.entries {
            if !entry.task.on_cpu {
                entry.prewalk(unwinder, memory);
            }
        }
    }

    /// Reads all tasks in a pause, each with the vCPU that runs it, as
    /// [`task_list::read`](crate::task_list::read) does. Tasks that are unchanged since the last
    /// refresh are not read again, nor are their stacks walked again. Linear in tasks.
    ///
    /// # Errors
    /// As those of [`task_list::read`](crate::task_list::read); the cache is then empty.
    pub fn refresh(
        &mut self,
        kernel: &Kernel,
        unwinder: &Unwinder,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        if self.generation != unwinder.generation() {
            let changed = unwinder.changed_since(self.generation);
            self.generation = unwinder.generation();
            self.drop_stacks(changed.as_deref());
        }
        self.list_tasks(kernel, memory, vcpus)
    }

    /// Drops the stacks that have any of this code on them, and those that are unreliable. `None`
    /// drops all stacks.
    fn drop_stacks(&mut self, code: Option<&[GvaRange]>) {
        let is_touched = |stack: &Stack, code: &[GvaRange]| {
            let is_in_any = |frame: &Frame| code.iter().any(|code| frame.is_in(code));
            stack.frames.iter().any(is_in_any)
        };
        let stays = |stack: &Stack| {
            stack.is_reliable() && code.is_some_and(|code| !is_touched(stack, code))
        };
        for (entry, summary) in self.entries.iter_mut().zip(&mut self.summaries) {
            if !entry.cached_stack().is_some_and(stays) {
                entry.drop_stack();
                summary.tag = None;
            }
        }
    }

    /// Reads all tasks as they are, although the lists may be in the middle of a change: in a guest
    /// that cannot go on, no later moment is better. Also returns each reason why the lists may
    /// lack a task, or have one that is gone. There is none where [`refresh`](Self::refresh) would
    /// have succeeded. Nothing is cached for the next refresh. Linear in tasks.
    ///
    /// The kernel adds and removes list entries such that walks along their `next` pointers, as
    /// here, are possible at any moment (`include/linux/rculist.h: list_add_tail_rcu`,
    /// `list_del_rcu`). While the lock is held, a task can be on one list and not on the other, or
    /// not yet counted.
    ///
    /// # Errors
    /// As those of [`task_list::read`](crate::task_list::read), without [`TasksError::Busy`] and
    /// [`TasksError::Miscounted`].
    pub fn read_in_mid_change(
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(TaskCache, Vec<TasksError>), TasksError> {
        let mut cache = TaskCache::uncached();
        let reader = TaskReader::new(kernel, memory);
        let mut doubts = Vec::new();
        doubts.extend(TaskCounts::read(kernel, memory).err());
        cache.walk_lists(&reader, &Fingerprint::new(kernel, memory))?;
        doubts.extend(check_count(kernel, memory, cache.listed).err());
        cache.add_unlisted(&reader, vcpus)?;
        let is_mid_change = |doubt: &TasksError| {
            matches!(doubt, TasksError::Busy(_) | TasksError::Miscounted { .. })
        };
        match doubts.iter().position(|doubt| !is_mid_change(doubt)) {
            Some(other) => Err(doubts.swap_remove(other)),
            None => {
                cache.caches = true;
                Ok((cache, doubts))
            }
        }
    }

    /// As [`refresh`](Self::refresh), without any check of the cached stacks.
    pub(crate) fn list_tasks(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        let done = self.try_list(kernel, memory, vcpus);
        if done.is_err() {
            *self = self.emptied();
        }
        done
    }

    /// All tasks, in the order of [`task_list::read`](crate::task_list::read).
    #[must_use]
    pub fn tasks(&self) -> &[CachedTask] {
        &self.entries
    }

    /// The tasks that a vCPU runs, in the order of vCPUs.
    pub fn running(&self) -> impl Iterator<Item = &CachedTask> {
        self.running.iter().filter_map(|at| self.entries.get(*at))
    }

    /// The patch state of the task at index `at` of [`tasks`](Self::tasks).
    #[must_use]
    pub fn patch_state(&self, at: usize) -> Option<PatchState> {
        self.summaries.get(at)?.patch_state
    }

    /// Tags every listed task whose stack is cached and reliable, and for which `wanted` returns
    /// true. A tag is removed as soon as the stack may have changed. A task has one tag at a time.
    pub fn tag(&mut self, tag: NonZeroU64, wanted: impl Fn(&Stack) -> bool) {
        let listed = self.entries.iter().zip(&mut self.summaries);
        let listed = listed.take(self.listed);
        for (entry, summary) in listed.filter(|(_, summary)| summary.tag != Some(tag)) {
            let stack = entry.cached_stack().filter(|stack| stack.is_reliable());
            let stays = !entry.may_change_unseen() && entry.task.vcpu.is_none();
            summary.tag = stack.filter(|stack| stays && wanted(stack)).map(|_| tag);
        }
    }

    /// Whether the task at index `at` of [`tasks`](Self::tasks) has this tag.
    #[must_use]
    pub fn is_tagged(&self, at: usize, tag: NonZeroU64) -> bool {
        self.summaries
            .get(at)
            .is_some_and(|summary| summary.tag == Some(tag))
    }

    pub(crate) fn into_tasks(self) -> Vec<Task> {
        self.entries.into_iter().map(|entry| entry.task).collect()
    }

    fn try_list(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        let counts = TaskCounts::read(kernel, memory)?;
        // Without start times a new task at the same address, with the same pid, could be taken for
        // the old one.
        self.caches &= kernel.layout.task.start_time.is_some() && counts.is_some();
        let reader = TaskReader::new(kernel, memory);
        let fingerprint = Fingerprint::new(kernel, memory);
        if self.counts != counts || !self.revalidate(&reader, &fingerprint)? {
            self.walk_lists(&reader, &fingerprint)?;
            check_count(kernel, memory, self.listed)?;
            self.counts = counts;
        }
        self.add_unlisted(&reader, vcpus)
    }

    /// Adds the tasks that are on no list, and assigns tasks to vCPUs.
    fn add_unlisted(
        &mut self,
        reader: &TaskReader<'_, '_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        let (kernel, memory) = (reader.kernel, reader.memory);
        self.add_idle_tasks(reader)?;
        let parked = kernel.parked_vcpus(memory, vcpus);
        let running = on_cpu::assign(kernel, memory, kernel.stack_areas()?, vcpus, &parked);
        self.set_vcpus(reader, &running);
        if let Ok(online) = kernel.percpu.online(memory) {
            let known = running.len() + parked.len();
            let all_known = vcpus.iter().filter(|vcpu| vcpu.online).count() == known;
            self.clear_offline_idle(&online, all_known);
        }
        Ok(())
    }

    /// Revalidates the listed tasks, of which none has left the lists, and reads changed ones
    /// again. False: the cache is not valid.
    fn revalidate(
        &mut self,
        reader: &TaskReader<'_, '_>,
        fingerprint: &Fingerprint<'_, '_>,
    ) -> Result<bool, TasksError> {
        let len = fingerprint.len();
        if self.listed == 0 || len == 0 || self.fingerprints.len() != self.listed * len {
            return Ok(false);
        }
        for unlisted in self.summaries.drain(self.listed..) {
            self.index.remove(&unlisted.addr);
        }
        self.entries.truncate(self.listed);
        let cached = CachedTasks {
            summaries: &mut self.summaries,
            fingerprints: &mut self.fingerprints,
            entries: &mut self.entries,
        };
        if !cached.revalidate(reader.kernel, reader.memory, len)? {
            return Ok(false);
        }
        Ok(check_count(reader.kernel, reader.memory, self.listed).is_ok())
    }

    /// Walks the lists: every thread of every process, from the boot CPU's idle task on.
    ///
    /// These circular lists are not walked by [`ListEntries`](crate::memory::list::ListEntries):
    /// the links are read together with the rest of each task, and a task that was met before is
    /// found by its address, so that a cycle is an error of its own.
    fn walk_lists(
        &mut self,
        reader: &TaskReader<'_, '_>,
        fingerprint: &Fingerprint<'_, '_>,
    ) -> Result<(), TasksError> {
        let empty = self.emptied();
        let mut old = OldCache {
            len: fingerprint.len(),
            cache: std::mem::replace(self, empty),
        };
        if old.cache.fingerprints.len() != old.cache.listed * old.len {
            // One of them could not be read whole: the others are not where their index says.
            old.cache.fingerprints.clear();
        }
        let init_task = reader.kernel.symbols.address("init_task")?;
        let mut leader = init_task;
        loop {
            let links = self.list(reader, fingerprint, leader, &mut old)?;
            self.list_threads(reader, fingerprint, (leader, links), &mut old)?;
            leader = reader.kernel.layout.task.tasks.container(links.process);
            if leader == init_task {
                break;
            }
        }
        self.listed = self.entries.len();
        Ok(())
    }

    /// Adds the other threads of a process, all around their list. The walk begins at the first
    /// thread (`leader`); the list's head is in the `signal_struct`, and must be met once.
    fn list_threads(
        &mut self,
        reader: &TaskReader<'_, '_>,
        fingerprint: &Fingerprint<'_, '_>,
        (leader, links): (Gva, ListLinks),
        old: &mut OldCache,
    ) -> Result<(), TasksError> {
        let layout = &reader.kernel.layout;
        let head = layout.signal.thread_head.of(links.signal);
        let start = layout.task.thread_node.of(leader);
        let mut node = links.thread;
        let mut passed_head = false;
        while node != start {
            node = if node != head {
                let thread = layout.task.thread_node.container(node);
                self.list(reader, fingerprint, thread, old)?.thread
            } else if passed_head {
                return Err(TasksError::Leaderless(leader));
            } else {
                passed_head = true;
                reader.memory.pointer(layout.list_next.of(head))?
            };
        }
        match passed_head {
            true => Ok(()),
            false => Err(TasksError::Leaderless(leader)),
        }
    }

    /// Adds a task that is on the lists, and returns its links.
    fn list(
        &mut self,
        reader: &TaskReader<'_, '_>,
        fingerprint: &Fingerprint<'_, '_>,
        addr: Gva,
        old: &mut OldCache,
    ) -> Result<ListLinks, TasksError> {
        // Before the rest of the task, so that a change in between shows.
        let now = self.caches.then(|| fingerprint.read(addr)).flatten();
        let unchanged = now.as_ref().and_then(|now| old.move_out(addr, now));
        let (tag, stable, entry) = match unchanged {
            // Its neighbours on the lists may have changed.
            Some((unchanged, tag)) => {
                let links = ListLinks::read(reader, addr)?;
                (tag, true, CachedTask { links, ..unchanged })
            }
            None => {
                let stable = now.is_some() && fingerprint.is_unchanged(addr);
                let mut entry = CachedTask::read(reader, addr)?;
                entry.caches_stack = self.caches;
                (None, stable, entry)
            }
        };
        if let Some(now) = now {
            self.fingerprints.extend_from_slice(&now);
        }
        let links = entry.links;
        self.add(entry, stable)?;
        if let Some(summary) = self.summaries.last_mut() {
            summary.tag = tag;
        }
        if self.entries.len() > MAX_CACHED || self.fingerprints.len() > MAX_FINGERPRINT_BYTES {
            self.caches = false;
            self.fingerprints = Vec::new();
        }
        Ok(links)
    }

    fn add(&mut self, entry: CachedTask, stable: bool) -> Result<(), TasksError> {
        if self.entries.len() >= MAX_TASKS {
            return Err(TasksError::TooMany);
        }
        let addr = entry.task.addr;
        if self.index.insert(addr, self.entries.len()).is_some() {
            return Err(TasksError::Cycle(addr));
        }
        self.push(entry, stable);
        Ok(())
    }

    fn push(&mut self, entry: CachedTask, stable: bool) {
        self.summaries.push(entry.summary(stable));
        self.entries.push(entry);
    }
}

/// The cache of the last refresh, while a new one is filled.
struct OldCache {
    /// The length of a fingerprint in bytes.
    len: usize,
    cache: TaskCache,
}

impl OldCache {
    /// Moves out the task at `addr` with its tag, if `now` is its fingerprint.
    fn move_out(&mut self, addr: Gva, now: &[u8]) -> Option<(CachedTask, Option<NonZeroU64>)> {
        let at = *self.cache.index.get(&addr)?;
        let start = at.checked_mul(self.len)?;
        let end = start.checked_add(self.len)?;
        let before = self.cache.fingerprints.get(start..end)?;
        let summary = self.cache.summaries.get(at)?;
        if before != now || summary.stale {
            return None;
        }
        let tag = summary.tag;
        let mut entry = self.cache.entries.get_mut(at)?.move_out();
        entry.reuse();
        Some((entry, tag))
    }
}
