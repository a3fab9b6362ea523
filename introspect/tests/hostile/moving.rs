//! A guest that runs while it is looked at: what was learned of a task in the middle of a change is not believed later.

use std::sync::atomic::{AtomicUsize, Ordering};

use introspect::task_list::TaskCache;
use introspect::{OutOfBounds, PhysMemory, Stack, Task};
use vm_memory::GuestAddress;

use crate::{memory, with};
use hostile_guest::image::{self, STACK, STACKS, task_at, virt};
use hostile_guest::mutate::Mutated;
use hostile_guest::{self};

/// Inside `struct task_struct`, as the BTF made here has them.
const FLAGS: usize = 0;
const ON_CPU: usize = 48;
const NVCSW: usize = 144;
const SP: usize = 176;
const TASK_SIZE: usize = 192;
/// TIF_NEED_FPU_LOAD.
const FPU: u64 = 1 << 14;
/// `on_cpu`, and the `on_rq` that lies beside it.
const ON: u64 = 1;
const OFF: u64 = 0;

/// What a task's own words say, one change after the other, as `kernel/sched/core.c: __schedule` and the way to user mode make them:
/// flags, `on_cpu`, `nvcsw`, and on which stack frame it sleeps.
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

/// The guest with task `task` at this point of its life.
fn at_point(task: usize, point: usize) -> Mutated<'static> {
    let (flags, on_cpu, nvcsw, below) = LIFE[point];
    let at = task_at(task);
    let sp = virt(STACKS + STACK * task + STACK) - below;
    with(&[
        (at + FLAGS, flags),
        (at + ON_CPU, on_cpu),
        (at + NVCSW, nvcsw),
        (at + SP, sp),
    ])
}

/// Memory in which that task goes on, each time so many words of its `task_struct` have been read.
struct Moving<'l> {
    life: &'l [Mutated<'static>],
    task: GuestAddress,
    /// After so many words it has come to this point.
    turns: &'l [(usize, usize)],
    words: AtomicUsize,
}

impl PhysMemory for Moving<'_> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let is_task = gpa.0.wrapping_sub(self.task.0) < TASK_SIZE as u64;
        // A longer copy is not made at one moment.
        for (gpa, word) in (gpa.0..).step_by(8).zip(buf.chunks_mut(8)) {
            let words = self
                .words
                .fetch_add(usize::from(is_task), Ordering::Relaxed)
                + usize::from(is_task);
            let passed = |(after, _): &&(usize, usize)| *after < words;
            let turn = self.turns.iter().rev().find(passed);
            self.life[turn.map_or(0, |(_, point)| *point)].read(GuestAddress(gpa), word)?;
        }
        Ok(())
    }
}

/// What a look in a pause says of everybody and their stacks.
fn in_pause(cache: &mut TaskCache, memory: &dyn PhysMemory) -> Vec<(Task, Stack)> {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let (memory, vcpus) = (kernel.memory(memory), image::vcpus());
    cache.refresh(kernel, unwinder, &memory, &vcpus).unwrap();
    let regs = |n: Option<u32>| n.and_then(|n| vcpus.get(n as usize));
    let each = cache.tasks().iter().map(|seen| {
        let stack = seen.stack(unwinder, &memory, regs(seen.task.vcpu));
        (seen.task.clone(), stack.into_owned())
    });
    each.collect()
}

fn walk_ahead(cache: &mut TaskCache, memory: &dyn PhysMemory) {
    let kernel = hostile_guest::kernel();
    cache.prewalk(kernel, hostile_guest::unwinder(), &kernel.memory(memory));
}

/// Looks ahead with one turn of the task's life after so many words of it, and another, then in a pause.
fn check(task: usize, known: bool, turns: [(usize, usize); 2], life: &[Mutated<'static>]) -> usize {
    let mut cache = TaskCache::new();
    if known {
        // The look ahead then has only to go through what it knows.
        in_pause(&mut cache, &memory());
    }
    let moving = Moving {
        life,
        task: GuestAddress(task_at(task) as u64),
        turns: &turns,
        words: AtomicUsize::new(0),
    };
    walk_ahead(&mut cache, &moving);
    let last = &life[turns[1].1];
    assert_eq!(
        in_pause(&mut cache, last),
        in_pause(&mut TaskCache::new(), last),
        "task {task}, known before: {known}, turns {turns:?}"
    );
    moving.words.into_inner()
}

#[test]
fn what_was_read_while_a_task_changed_is_read_again() {
    for task in [2, 3] {
        let life: Vec<_> = (0..LIFE.len()).map(|point| at_point(task, point)).collect();
        for known in [false, true] {
            let words = check(task, known, [(usize::MAX, 0); 2], &life);
            assert!(words > 20, "{words}");
            for first in 0..=words {
                for second in first..=words {
                    for middle in 0..LIFE.len() {
                        for last in middle..LIFE.len() {
                            check(task, known, [(first, middle), (second, last)], &life);
                        }
                    }
                }
            }
        }
    }
}
