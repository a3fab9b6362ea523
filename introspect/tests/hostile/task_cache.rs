//! What the task cache keeps between pauses equals what a fresh cache reads.

use introspect::task_list::TaskCache;
use introspect::{Gva, GvaRange, PhysMemory, Stack, TasksError, Unwinder};

use crate::{memory, with};
use hostile_guest::image::{self, STACK, STACKS, task_at};
use hostile_guest::mutate::Mutated;
use hostile_guest::{self};

/// Offsets in `struct task_struct`, as the synthetic BTF has them.
const NVCSW: usize = 144;
const PID: usize = 60;
const TASK_SIZE: usize = 216;
/// Words of it that other code changes: flags, state, links, patch state, and those that differ
/// when another task is at its address.
const CHANGED_BY_OTHERS: [usize; 10] = [0, 16, 24, 40, 48, 72, 88, 136, 144, 184];
/// Those of them that link the lists: no task is added or removed without being counted.
const LINKS: [usize; 2] = [72, 88];

/// The physical address of a kernel variable in the image.
fn variable(name: &str) -> usize {
    let at = hostile_guest::kernel().symbols.address(name).unwrap().0;
    usize::try_from(at - image::BASE).unwrap() + image::IMAGE
}

fn refresh(
    cache: &mut TaskCache,
    unwinder: &Unwinder,
    memory: &Mutated<'_>,
) -> Result<(), TasksError> {
    let kernel = hostile_guest::kernel();
    cache.refresh(kernel, unwinder, &kernel.memory(memory), &image::vcpus())
}

/// The stack of each task.
fn stacks(cache: &TaskCache, unwinder: &Unwinder, memory: &dyn PhysMemory) -> Vec<Stack> {
    let vcpus = image::vcpus();
    let memory = hostile_guest::kernel().memory(memory);
    let regs = |n: Option<u32>| n.and_then(|n| vcpus.get(n as usize));
    let all = cache.tasks().iter();
    all.map(|cached| {
        cached
            .stack(unwinder, &memory, regs(cached.task.vcpu))
            .into_owned()
    })
    .collect()
}

fn fresh(unwinder: &Unwinder, memory: &Mutated<'_>) -> Vec<Stack> {
    let mut cache = TaskCache::new();
    refresh(&mut cache, unwinder, memory).unwrap();
    stacks(&cache, unwinder, memory)
}

#[test]
fn any_change_of_a_task_is_noticed() {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let good = memory();
    let mut compared = 0;
    for task in 0..5 {
        for word in (0..TASK_SIZE).step_by(8) {
            for value in [0, 1, 7, u64::MAX, image::DIRECT + 0x100] {
                let mut cache = TaskCache::new();
                refresh(&mut cache, unwinder, &good).unwrap();
                stacks(&cache, unwinder, &good);
                let mut changes = vec![(task_at(task) + word, value)];
                if !CHANGED_BY_OTHERS.contains(&word) {
                    // Words that only the task itself changes, it changes by running.
                    changes.push((task_at(task) + NVCSW, 7));
                }
                if LINKS.contains(&word) {
                    changes.push((variable("total_forks"), 1));
                }
                let changed = with(&changes);
                let listed =
                    introspect::task_list::read(kernel, &kernel.memory(&changed), &image::vcpus());
                let result = refresh(&mut cache, unwinder, &changed);
                assert_eq!(
                    listed.is_ok(),
                    result.is_ok(),
                    "task {task}, {word}: {value:#x}"
                );
                let Ok(listed) = listed else { continue };
                let tasks = cache.tasks().iter().map(|cached| &cached.task);
                assert!(tasks.eq(&listed), "task {task}, {word}: {value:#x}");
                assert_eq!(
                    stacks(&cache, unwinder, &changed),
                    fresh(unwinder, &changed),
                    "task {task}, {word}: {value:#x}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 200, "{compared}");
}

#[test]
fn the_stack_of_a_task_that_has_not_run_is_not_walked_again() {
    let unwinder = hostile_guest::unwinder();
    let good = memory();
    let mut cache = TaskCache::new();
    refresh(&mut cache, unwinder, &good).unwrap();
    let before = stacks(&cache, unwinder, &good);
    assert!(before[2].is_reliable() && !before[2].frames.is_empty());

    // The saved return address, which only the task itself could change, and only by running.
    let saved = STACKS + STACK * 2 + STACK - 192 + 8;
    let changed_without_running = with(&[(saved, 0)]);
    refresh(&mut cache, unwinder, &changed_without_running).unwrap();
    assert_eq!(stacks(&cache, unwinder, &changed_without_running), before);

    let after_running = with(&[(saved, 0), (task_at(2) + NVCSW, 1)]);
    refresh(&mut cache, unwinder, &after_running).unwrap();
    let after = stacks(&cache, unwinder, &after_running);
    assert!(!after[2].is_reliable());
    assert_eq!(after, fresh(unwinder, &after_running));

    // An unreliable stack is walked again in any case.
    let restored = with(&[(task_at(2) + NVCSW, 1)]);
    refresh(&mut cache, unwinder, &restored).unwrap();
    assert_eq!(stacks(&cache, unwinder, &restored), before);
}

#[test]
fn an_added_or_removed_task_is_noticed_and_the_other_stacks_are_kept() {
    let unwinder = hostile_guest::unwinder();
    let good = memory();
    let mut cache = TaskCache::new();
    refresh(&mut cache, unwinder, &good).unwrap();
    let before = stacks(&cache, unwinder, &good);

    // The second thread of the last process is removed, and the kernel counts one task less.
    let head = image::virt(image::signal_at(2));
    let count = variable("nr_threads");
    let saved = STACKS + STACK * 2 + STACK - 192 + 8;
    let removed = with(&[(task_at(2) + 88, head), (count, 2), (saved, 0)]);
    refresh(&mut cache, unwinder, &removed).unwrap();
    assert_eq!(cache.tasks().len(), 4);
    let kept = stacks(&cache, unwinder, &removed);
    assert_eq!(kept[1], before[1]);
    assert_eq!(kept[2], before[2]);

    refresh(&mut cache, unwinder, &good).unwrap();
    assert_eq!(cache.tasks().len(), 5);
    assert_eq!(stacks(&cache, unwinder, &good), before);
}

#[test]
fn a_change_of_code_invalidates_the_stacks_with_it_and_no_others() {
    let mut unwinder = hostile_guest::unwinder().clone();
    let good = memory();
    let mut cache = TaskCache::new();
    refresh(&mut cache, &unwinder, &good).unwrap();
    let before = stacks(&cache, &unwinder, &good);
    let walked_stacks = |cache: &TaskCache| -> Vec<bool> {
        let all = cache.tasks().iter();
        all.map(|cached| cached.is_walked()).collect()
    };
    let mut unchanged = cache.clone();
    refresh(&mut unchanged, &unwinder, &good).unwrap();
    let walked = walked_stacks(&unchanged);
    assert!(walked[2] && walked.iter().filter(|walked| **walked).count() > 1);

    let unused_code = GvaRange::new(Gva(image::virt(0)), Gva(image::virt(16)));
    unwinder.add_transient(unused_code);
    unwinder.remove_transient(unused_code);
    refresh(&mut cache, &unwinder, &good).unwrap();
    assert_eq!(walked_stacks(&cache), walked);

    for frame in &before[2].frames {
        // The last byte of this range is the call that the frame is in.
        let code = GvaRange::new(frame.ip.sub(8), frame.ip);
        unwinder.add_transient(code);
        refresh(&mut cache, &unwinder, &good).unwrap();
        assert!(!walked_stacks(&cache)[2]);
        let now = stacks(&cache, &unwinder, &good);
        assert!(!now[2].is_reliable());
        assert_eq!(now, fresh(&unwinder, &good));
        unwinder.remove_transient(code);
        refresh(&mut cache, &unwinder, &good).unwrap();
        assert_eq!(stacks(&cache, &unwinder, &good), before);
    }
}

#[test]
fn a_prewalk_is_revalidated() {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let good = memory();
    let expected = fresh(unwinder, &good);
    let pids = with(&[
        (task_at(3) + PID, 77),
        (task_at(3) + NVCSW, 8),
        (task_at(2) + NVCSW, 9),
    ]);
    for prewalked in [&good, &pids] {
        let mut cache = TaskCache::new();
        cache.prewalk(kernel, unwinder, &kernel.memory(prewalked));
        refresh(&mut cache, unwinder, &good).unwrap();
        assert_eq!(stacks(&cache, unwinder, &good), expected);
        assert_eq!(cache.tasks()[3].task.pid, 3);
    }
}
