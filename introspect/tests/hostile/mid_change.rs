//! The lists of tasks in the middle of a change: refused by a reader that can come back later, and
//! read with a warning where there is no later, within the same bounds.

use introspect::task_list::{self, TaskCache};
use introspect::{Stack, TaskKind, TasksError};

use crate::{TASKS, THREAD_NODE, memory, with};
use hostile_guest::bounded;
use hostile_guest::image::{self, COUNTS, signal_at, task_at, virt};
use hostile_guest::mutate::Mutated;

/// The physical address of `tasklist_lock`.
const LOCK: usize = image::IMAGE + 0x2_0090;
/// `kernel/locking/qrwlock.c`: `_QW_LOCKED`.
const HELD: (usize, u64) = (LOCK, 0xff);

type AsIs = Result<(TaskCache, Vec<TasksError>), TasksError>;

fn as_is(memory: &Mutated<'_>) -> AsIs {
    let kernel = hostile_guest::kernel();
    bounded("tasks as they are", || {
        TaskCache::read_in_mid_change(kernel, &kernel.memory(memory), &image::vcpus())
    })
}

fn doubts(read: &AsIs) -> Vec<String> {
    let (_, doubts) = read.as_ref().unwrap();
    doubts.iter().map(TasksError::to_string).collect()
}

/// The stack of each task.
fn stacks(cache: &TaskCache, memory: &Mutated<'_>) -> Vec<Stack> {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let (memory, vcpus) = (kernel.memory(memory), image::vcpus());
    let regs = |n: Option<u32>| n.and_then(|n| vcpus.get(n as usize));
    let tasks = cache.tasks().iter();
    tasks
        .map(|cached| {
            let stack = cached.stack(unwinder, &memory, regs(cached.task.vcpu));
            stack.into_owned()
        })
        .collect()
}

#[test]
fn a_held_lock_is_refused_or_a_doubt() {
    let kernel = hostile_guest::kernel();
    let held = with(&[HELD]);
    let refused = task_list::read(kernel, &kernel.memory(&held), &image::vcpus());
    assert!(matches!(refused, Err(TasksError::Busy("tasklist_lock"))));

    let read = as_is(&held);
    assert_eq!(doubts(&read), ["tasklist_lock is held for writing"]);
    let (cache, _) = read.unwrap();
    let good = memory();
    let plain = task_list::read(kernel, &kernel.memory(&good), &image::vcpus()).unwrap();
    let tasks: Vec<_> = cache.tasks().iter().map(|cached| &cached.task).collect();
    assert_eq!(tasks, plain.iter().collect::<Vec<_>>());
    assert_eq!(tasks.last().unwrap().kind, TaskKind::Idle);

    // The lock says nothing about stacks: they are what they are without it.
    let (free, none) = as_is(&good).unwrap();
    assert!(none.is_empty());
    assert_eq!(stacks(&cache, &held), stacks(&free, &good));
}

/// `kernel/exit.c: __unhash_process` counts a task first and takes it off the lists last.
#[test]
fn a_task_that_is_counted_and_not_listed_is_a_doubt() {
    let (threads, _) = COUNTS[0];
    let counted = with(&[HELD, (threads, 2)]);
    let read = as_is(&counted);
    assert_eq!(doubts(&read).len(), 2, "{read:?}");
    assert!(doubts(&read)[1].contains("hold 4 tasks and the kernel counts 3"));
    assert_eq!(read.unwrap().0.tasks().len(), 5);

    // A thread is off its list, and still counted.
    let head = virt(signal_at(2));
    let unlinked = with(&[HELD, (task_at(2) + THREAD_NODE, head)]);
    let read = as_is(&unlinked);
    assert_eq!(doubts(&read).len(), 2, "{read:?}");
    assert_eq!(read.unwrap().0.tasks().len(), 4);
}

#[test]
fn corrupt_lists_are_refused_with_or_without_the_lock() {
    for held in [&[HELD][..], &[]] {
        let back = (task_at(2) + TASKS, virt(task_at(1) + TASKS));
        let cycle = as_is(&with(&[held, &[back]].concat()));
        assert!(matches!(cycle, Err(TasksError::Cycle(_))), "{cycle:?}");
        let itself = (task_at(2) + THREAD_NODE, virt(task_at(2) + THREAD_NODE));
        let leaderless = as_is(&with(&[held, &[itself]].concat()));
        let is_leaderless = matches!(leaderless, Err(TasksError::Leaderless(_)));
        assert!(is_leaderless, "{leaderless:?}");
        let wild = as_is(&with(
            &[held, &[(task_at(1) + TASKS, 0xdead_0000)]].concat(),
        ));
        assert!(matches!(wild, Err(TasksError::Read(_))), "{wild:?}");
    }
}
