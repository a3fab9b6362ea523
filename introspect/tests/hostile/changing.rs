//! A guest that runs while it is read: what was read of a task in the middle of a change is not
//! used later.

use std::sync::atomic::{AtomicUsize, Ordering};

use introspect::task_list::TaskCache;
use introspect::{OutOfBounds, PhysMemory, Stack, Task};
use vm_memory::GuestAddress;

use crate::{memory, with};
use hostile_guest::image::{self, STACK, STACKS, task_at, virt};
use hostile_guest::mutate::Mutated;
use hostile_guest::{self};

/// Offsets in `struct task_struct`, as the synthetic BTF has them.
const FLAGS: usize = 0;
const ON_CPU: usize = 48;
const NVCSW: usize = 144;
const SP: usize = 176;
const TASK_SIZE: usize = 192;
/// TIF_NEED_FPU_LOAD.
const FPU: u64 = 1 << 14;
/// Values of `on_cpu`, with the `on_rq` next to it.
const ON: u64 = 1;
const OFF: u64 = 0;

/// The words of a task, one change after the other, as `kernel/sched/core.c: __schedule` and the
/// exit to user mode make them: flags, `on_cpu`, `nvcsw`, and how far below the top of its stack it
/// sleeps.
const LIFE: [(u64, u64, u64, u64); 11] = [
    (FPU, OFF, 0, 192),
    (FPU, ON, 0, 192),
    (0, ON, 0, 192),
    (0, ON, 1, 192),
    (FPU, ON, 1, 192),
    (FPU, ON, 1, 256),
    (FPU, OFF, 1, 256),
    (FPU, ON, 1, 256),
    (0, ON, 1, 256),
    (FPU, ON, 1, 256),
    (0, ON, 1, 256),
];

/// The guest with task `task` at this step of `LIFE`.
fn at_step(task: usize, step: usize) -> Mutated<'static> {
    let (flags, on_cpu, nvcsw, below) = LIFE[step];
    let at = task_at(task);
    let sp = virt(STACKS + STACK * task + STACK) - below;
    with(&[
        (at + FLAGS, flags),
        (at + ON_CPU, on_cpu),
        (at + NVCSW, nvcsw),
        (at + SP, sp),
    ])
}

/// Memory in which the task changes after some number of words of its `task_struct` have been read.
struct ChangingMemory<'l> {
    life: &'l [Mutated<'static>],
    task: GuestAddress,
    /// Pairs of a number of words and the step that the task is at after that many were read.
    changes: &'l [(usize, usize)],
    words: AtomicUsize,
}

impl PhysMemory for ChangingMemory<'_> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let is_task = gpa.0.wrapping_sub(self.task.0) < TASK_SIZE as u64;
        // A longer copy is not atomic.
        for (gpa, word) in (gpa.0..).step_by(8).zip(buf.chunks_mut(8)) {
            let words = self
                .words
                .fetch_add(usize::from(is_task), Ordering::Relaxed)
                + usize::from(is_task);
            let passed = |(after, _): &&(usize, usize)| *after < words;
            let change = self.changes.iter().rev().find(passed);
            self.life[change.map_or(0, |(_, step)| *step)].read(GuestAddress(gpa), word)?;
        }
        Ok(())
    }
}

/// All tasks and their stacks, as a refresh in a pause returns them.
fn in_pause(cache: &mut TaskCache, memory: &dyn PhysMemory) -> Vec<(Task, Stack)> {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let (memory, vcpus) = (kernel.memory(memory), image::vcpus());
    cache.refresh(kernel, unwinder, &memory, &vcpus).unwrap();
    let regs = |n: Option<u32>| n.and_then(|n| vcpus.get(n as usize));
    let each = cache.tasks().iter().map(|cached| {
        let stack = cached.stack(unwinder, &memory, regs(cached.task.vcpu));
        (cached.task.clone(), stack.into_owned())
    });
    each.collect()
}

fn prewalk(cache: &mut TaskCache, memory: &dyn PhysMemory) {
    let kernel = hostile_guest::kernel();
    cache.prewalk(kernel, hostile_guest::unwinder(), &kernel.memory(memory));
}

/// Prewalks while the task changes twice, each time after some number of words were read; then
/// compares a refresh in a pause with a fresh cache. Returns the number of words that were read.
fn check(
    task: usize,
    cached: bool,
    changes: [(usize, usize); 2],
    life: &[Mutated<'static>],
) -> usize {
    let mut cache = TaskCache::new();
    if cached {
        // The prewalk then only revalidates what is cached.
        in_pause(&mut cache, &memory());
    }
    let changing = ChangingMemory {
        life,
        task: GuestAddress(task_at(task) as u64),
        changes: &changes,
        words: AtomicUsize::new(0),
    };
    prewalk(&mut cache, &changing);
    let last = &life[changes[1].1];
    assert_eq!(
        in_pause(&mut cache, last),
        in_pause(&mut TaskCache::new(), last),
        "task {task}, cached before: {cached}, changes {changes:?}"
    );
    changing.words.into_inner()
}

#[test]
fn a_task_that_changed_during_the_prewalk_is_read_again() {
    for task in [2, 3] {
        let life: Vec<_> = (0..LIFE.len()).map(|step| at_step(task, step)).collect();
        for cached in [false, true] {
            let words = check(task, cached, [(usize::MAX, 0); 2], &life);
            assert!(words > 20, "{words}");
            for first in 0..=words {
                for second in first..=words {
                    for middle in 0..LIFE.len() {
                        for last in middle..LIFE.len() {
                            check(task, cached, [(first, middle), (second, last)], &life);
                        }
                    }
                }
            }
        }
    }
}
