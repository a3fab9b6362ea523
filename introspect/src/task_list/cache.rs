//! All tasks and their stacks, kept from one look to the next: only what may have changed in between is read again.
//!
//! A pause is paid for by the guest, so what can be learned before it is: [`TaskCache::prewalk`] lists and walks while the guest
//! runs, and the look in the pause only makes sure of what it finds unchanged. What was learned of a task holds if a few fields of its
//! `task_struct` still say the same: when it was born, how often it was switched out, that it is on no CPU, and what others may change
//! of it ([`proof`](crate::task_list::fingerprint)); the other fields and the frames of its stack only it changes itself, by running. (Its name can be
//! changed by another.) That nobody came and nobody left, the kernel's own counts say.
//!
//! Knows the lists that tasks are on; it must not know what stacks look like.

use std::{collections::HashMap, num::NonZeroU64};

use crate::addr::{Gva, GvaRange};
use crate::kernel::Kernel;
use crate::memory::kernel::KernelMemory;
use crate::task::reader::TaskReader;
use crate::task::{PatchState, Task, TaskKind};
use crate::task_list::counts::{TaskCounts, check_count};
use crate::task_list::entry::{ListLinks, TaskSummary};
use crate::task_list::error::{MAX_TASKS, TasksError};
use crate::task_list::fingerprint::Fingerprint;
use crate::task_list::on_cpu::{self, RunningTask};
use crate::task_list::revalidate::CachedTasks;
use crate::unwind::Unwinder;
use crate::unwind::stack::{Frame, Stack};
use crate::vcpu::VcpuRegs;

pub use crate::task_list::entry::CachedTask;

/// Of more tasks, or more bytes of them, nothing is kept: a bound on what is held for one guest.
const MOST_KEPT: usize = 1 << 15;
const MOST_RAW: usize = 32 << 20;

/// All tasks of a guest, as seen in the last look.
#[derive(Clone, Debug)]
pub struct TaskCache {
    seen: Vec<CachedTask>,
    /// For each of them.
    briefs: Vec<TaskSummary>,
    /// Where in `seen` each is.
    at: HashMap<Gva, usize>,
    /// Those that a vCPU runs.
    running: Vec<usize>,
    /// So many of `seen` are on the lists; the others are idle, or have left them.
    listed: usize,
    /// What proves of each of those that it is the same, one behind the other; none when nothing is kept.
    raw: Vec<u8>,
    keep: bool,
    /// Since before the lists were gone through.
    census: Option<TaskCounts>,
    /// Of the code that the stacks were walked by.
    generation: u64,
}

impl Default for TaskCache {
    fn default() -> TaskCache {
        TaskCache::new()
    }
}

impl TaskCache {
    /// One that has seen nothing yet.
    #[must_use]
    pub fn new() -> TaskCache {
        TaskCache {
            seen: Vec::new(),
            briefs: Vec::new(),
            at: HashMap::new(),
            running: Vec::new(),
            listed: 0,
            raw: Vec::new(),
            keep: true,
            census: None,
            generation: 0,
        }
    }

    /// One that keeps nothing from look to look.
    pub(crate) fn once() -> TaskCache {
        TaskCache {
            keep: false,
            ..TaskCache::new()
        }
    }

    /// Lists tasks and walks the stacks of those that sleep, while the guest runs: what comes out is worth nothing but to be made
    /// sure of in the next [`look`](Self::look). What cannot be read now is left to that.
    pub fn prewalk(&mut self, kernel: &Kernel, unwinder: &Unwinder, memory: &KernelMemory<'_>) {
        if self.refresh(kernel, unwinder, memory, &[]).is_err() {
            return;
        }
        for seen in &self.seen {
            if !seen.task.on_cpu {
                seen.stack(unwinder, memory, None);
            }
        }
    }

    /// Sees all tasks, in a pause, each with the vCPU that runs it: as [`task_list::read`](crate::task_list::read) does, and what has not
    /// changed since the last look is not worked out again. Linear in tasks.
    ///
    /// # Errors
    /// As those of [`task_list::read`](crate::task_list::read); then the survey is empty.
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
            self.forget(changed.as_deref());
        }
        self.list_tasks(kernel, memory, vcpus)
    }

    /// Forgets the stacks with any of this code on them; none: all stacks.
    fn forget(&mut self, code: Option<&[GvaRange]>) {
        let is_touched = |stack: &Stack, code: &[GvaRange]| {
            let is_in_any = |frame: &Frame| code.iter().any(|code| frame.is_in(code));
            stack.frames.iter().any(is_in_any)
        };
        let stays = |stack: &Stack| {
            stack.is_reliable() && code.is_some_and(|code| !is_touched(stack, code))
        };
        for (seen, brief) in self.seen.iter_mut().zip(&mut self.briefs) {
            if !seen.known_stack().is_some_and(stays) {
                seen.forget();
                brief.mark = None;
            }
        }
    }

    /// The same without a word on stacks.
    pub(crate) fn list_tasks(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        let done = self.try_list(kernel, memory, vcpus);
        if done.is_err() {
            *self = TaskCache {
                keep: self.keep,
                generation: self.generation,
                ..TaskCache::new()
            };
        }
        done
    }

    /// Everybody, in the order of [`task_list::read`](crate::task_list::read).
    #[must_use]
    pub fn tasks(&self) -> &[CachedTask] {
        &self.seen
    }

    /// Those of them that a vCPU runs, in the order of vCPUs.
    pub fn running(&self) -> impl Iterator<Item = &CachedTask> {
        self.running.iter().filter_map(|at| self.seen.get(*at))
    }

    /// The patch state of number `at` of [`seen`](Self::seen).
    #[must_use]
    pub fn patch_state(&self, at: usize) -> Option<PatchState> {
        self.briefs.get(at)?.patch_state
    }

    /// Marks everybody whose stack is known, can be relied on and is as `wanted`. A mark goes when the stack is no longer known to be the
    /// same; a task has one at a time.
    pub fn tag(&mut self, mark: NonZeroU64, wanted: impl Fn(&Stack) -> bool) {
        let listed = self.seen.iter().zip(&mut self.briefs).take(self.listed);
        for (seen, brief) in listed.filter(|(_, brief)| brief.mark != Some(mark)) {
            let stack = seen.known_stack().filter(|stack| stack.is_reliable());
            let stays = !seen.moves() && seen.task.vcpu.is_none();
            brief.mark = stack.filter(|stack| stays && wanted(stack)).map(|_| mark);
        }
    }

    /// Whether number `at` of [`seen`](Self::seen) has this mark.
    #[must_use]
    pub fn is_tagged(&self, at: usize, mark: NonZeroU64) -> bool {
        self.briefs
            .get(at)
            .is_some_and(|brief| brief.mark == Some(mark))
    }

    pub(crate) fn into_tasks(self) -> Vec<Task> {
        self.seen.into_iter().map(|seen| seen.task).collect()
    }

    fn try_list(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
    ) -> Result<(), TasksError> {
        let census = TaskCounts::take(kernel, memory)?;
        // Where a task's birth does not show, another in its place, with its number, could be taken for it.
        self.keep &= kernel.layout.task.start_time.is_some() && census.is_some();
        let reader = TaskReader::new(kernel, memory);
        let proof = Fingerprint::new(kernel, memory);
        if self.census != census || !self.renew(&reader, &proof)? {
            self.list_anew(&reader, &proof)?;
            self.census = census;
        }
        self.idle(&reader)?;
        let places = kernel.places()?;
        let running = on_cpu::attribute(kernel, memory, places, vcpus);
        self.attribute(&reader, &running);
        if let Ok(online) = kernel.percpu.online(memory) {
            let all_known = vcpus.iter().filter(|vcpu| vcpu.online).count() == running.len();
            self.settle_offline_idle(&online, all_known);
        }
        Ok(())
    }

    /// Goes through those that are known, of whom nobody has left the lists, and reads again what has changed of them. False: what is
    /// known does not hold.
    fn renew(
        &mut self,
        reader: &TaskReader<'_, '_>,
        proof: &Fingerprint<'_, '_>,
    ) -> Result<bool, TasksError> {
        let len = proof.len();
        if self.listed == 0 || len == 0 || self.raw.len() != self.listed * len {
            return Ok(false);
        }
        for tail in self.briefs.drain(self.listed..) {
            self.at.remove(&tail.addr);
        }
        self.seen.truncate(self.listed);
        let known = CachedTasks {
            briefs: &mut self.briefs,
            raw: &mut self.raw,
            seen: &mut self.seen,
        };
        if !known.renew(reader.kernel, reader.memory, len)? {
            return Ok(false);
        }
        Ok(check_count(reader.kernel, reader.memory, self.listed).is_ok())
    }

    /// Every thread of every process, from the boot CPU's idle task on.
    fn list_anew(
        &mut self,
        reader: &TaskReader<'_, '_>,
        proof: &Fingerprint<'_, '_>,
    ) -> Result<(), TasksError> {
        let old = std::mem::replace(
            self,
            TaskCache {
                keep: self.keep,
                generation: self.generation,
                ..TaskCache::new()
            },
        );
        let mut old = Old {
            len: proof.len(),
            survey: old,
        };
        if old.survey.raw.len() != old.survey.listed * old.len {
            // One of them could not be read whole: the others are not where they seem.
            old.survey.raw.clear();
        }
        let init_task = reader.kernel.symbols.address("init_task")?;
        let mut leader = init_task;
        loop {
            let links = self.list(reader, proof, leader, &mut old)?;
            self.list_threads(reader, proof, (leader, links), &mut old)?;
            leader = reader.kernel.layout.task.tasks.container(links.process);
            if leader == init_task {
                break;
            }
        }
        self.listed = self.seen.len();
        check_count(reader.kernel, reader.memory, self.listed)
    }

    /// The other threads of a process: all around their list, on which its first one stands, too. The list's head is in what they share.
    fn list_threads(
        &mut self,
        reader: &TaskReader<'_, '_>,
        proof: &Fingerprint<'_, '_>,
        (leader, links): (Gva, ListLinks),
        old: &mut Old,
    ) -> Result<(), TasksError> {
        let layout = &reader.kernel.layout;
        let head = layout.signal.thread_head.of(links.signal);
        let start = layout.task.thread_node.of(leader);
        let mut node = links.thread;
        let mut passed_head = false;
        while node != start {
            node = if node != head {
                let thread = layout.task.thread_node.container(node);
                self.list(reader, proof, thread, old)?.thread
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

    /// One that is on the lists, and where they go on from it.
    fn list(
        &mut self,
        reader: &TaskReader<'_, '_>,
        proof: &Fingerprint<'_, '_>,
        addr: Gva,
        old: &mut Old,
    ) -> Result<ListLinks, TasksError> {
        // Before the rest: whatever changes in between then shows.
        let now = self.keep.then(|| proof.gather(addr)).flatten();
        let known = now.as_ref().and_then(|now| old.take(addr, now));
        let (mark, still, seen) = match known {
            // Others have come and gone around it.
            Some((known, mark)) => {
                let links = ListLinks::read(reader, addr)?;
                (mark, true, CachedTask { links, ..known })
            }
            None => {
                let still = now.is_some() && proof.holds(addr);
                let mut seen = CachedTask::read(reader, addr)?;
                seen.kept = self.keep;
                (None, still, seen)
            }
        };
        if let Some(now) = now {
            self.raw.extend_from_slice(&now);
        }
        let links = seen.links;
        self.add(seen, still)?;
        if let Some(brief) = self.briefs.last_mut() {
            brief.mark = mark;
        }
        if self.seen.len() > MOST_KEPT || self.raw.len() > MOST_RAW {
            self.keep = false;
            self.raw = Vec::new();
        }
        Ok(links)
    }

    fn add(&mut self, seen: CachedTask, still: bool) -> Result<(), TasksError> {
        if self.seen.len() >= MAX_TASKS {
            return Err(TasksError::TooMany);
        }
        let addr = seen.task.addr;
        if self.at.insert(addr, self.seen.len()).is_some() {
            return Err(TasksError::Cycle(addr));
        }
        self.push(seen, still);
        Ok(())
    }

    fn push(&mut self, seen: CachedTask, still: bool) {
        self.briefs.push(seen.brief(still));
        self.seen.push(seen);
    }

    /// Idle tasks are on no list; the boot CPU's is `init_task`.
    fn idle(&mut self, reader: &TaskReader<'_, '_>) -> Result<(), TasksError> {
        let percpu = &reader.kernel.percpu;
        let variable = reader.kernel.symbols.address("idle_threads")?;
        for cpu in percpu.cpus() {
            let Some(slot) = percpu.address(variable, *cpu) else {
                continue;
            };
            let idle = reader.memory.pointer(slot)?;
            if idle.is_null() {
                continue;
            }
            if !self.at.contains_key(&idle) {
                self.add(CachedTask::read(reader, idle)?, false)?;
            }
            let known = self.at.get(&idle);
            if let Some(seen) = known.and_then(|&at| self.seen.get_mut(at)) {
                seen.task.kind = TaskKind::Idle;
                seen.task.cpu = Some(*cpu);
            }
        }
        Ok(())
    }

    /// Says of each running task which vCPU runs it. A task that releases itself has left the lists and still runs.
    fn attribute(&mut self, reader: &TaskReader<'_, '_>, running: &[RunningTask]) {
        self.running.clear();
        for on in running {
            if !self.at.contains_key(&on.task)
                && let Ok(seen) = CachedTask::read(reader, on.task)
            {
                self.at.insert(on.task, self.seen.len());
                self.push(seen, false);
            }
            let Some(&at) = self.at.get(&on.task) else {
                continue;
            };
            if let (Some(seen), Some(brief)) = (self.seen.get_mut(at), self.briefs.get_mut(at)) {
                seen.task.vcpu = Some(on.vcpu);
                seen.task.cpu = Some(on.cpu);
                seen.forget();
                brief.mark = None;
                self.running.push(at);
            }
        }
    }

    /// `kernel/sched/core.c: init_idle` says of each idle task that it is on its CPU, also when that CPU has never started.
    /// Where every vCPU that runs is accounted for, it runs nowhere. `online` rises. The boot CPU's, which is on the lists, has run.
    fn settle_offline_idle(&mut self, online: &[u32], all_known: bool) {
        let tail = self.seen.iter_mut().skip(self.listed);
        for task in tail
            .map(|seen| &mut seen.task)
            .filter(|task| task.kind == TaskKind::Idle && task.vcpu.is_none())
        {
            let offline = |cpu| online.binary_search(&cpu).is_err();
            if all_known && task.cpu.is_some_and(offline) {
                task.on_cpu = false;
            }
        }
    }
}

/// What an earlier look knew.
struct Old {
    /// Bytes that prove each task.
    len: usize,
    survey: TaskCache,
}

impl Old {
    /// The task at `addr` with its mark, if it proves to be as it was.
    fn take(&mut self, addr: Gva, now: &[u8]) -> Option<(CachedTask, Option<NonZeroU64>)> {
        let at = *self.survey.at.get(&addr)?;
        let start = at.checked_mul(self.len)?;
        let before = self.survey.raw.get(start..start.checked_add(self.len)?)?;
        let brief = self.survey.briefs.get(at)?;
        if before != now || brief.anew {
            return None;
        }
        let mark = brief.mark;
        let mut seen = self.survey.seen.get_mut(at)?.take();
        seen.settle();
        Some((seen, mark))
    }
}
