//! What is kept of tasks and stacks from look to look is what a fresh look would find.

use introspect::task_list::TaskCache;
use introspect::{Gva, GvaRange, PhysMemory, Stack, TasksError, Unwinder};

use crate::{memory, with};
use hostile_guest::image::{self, STACK, STACKS, task_at};
use hostile_guest::mutate::Mutated;
use hostile_guest::{self};

/// Inside `struct task_struct`, as the BTF made here has them.
const NVCSW: usize = 144;
const PID: usize = 60;
const TASK_SIZE: usize = 192;
/// Words of it that others change than the task itself: flags, state, links, patch state, and what it is when another has its place.
const BY_OTHERS: [usize; 10] = [0, 16, 24, 40, 48, 72, 88, 136, 144, 184];
/// Those of them that lead on in the lists: no task comes or goes without being counted.
const LINKS: [usize; 2] = [72, 88];

/// Where the image has a variable of the kernel's.
fn variable(name: &str) -> usize {
    let at = hostile_guest::kernel().symbols.address(name).unwrap().0;
    usize::try_from(at - image::BASE).unwrap() + image::IMAGE
}

fn look(
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
    all.map(|seen| {
        seen.stack(unwinder, &memory, regs(seen.task.vcpu))
            .into_owned()
    })
    .collect()
}

fn fresh(unwinder: &Unwinder, memory: &Mutated<'_>) -> Vec<Stack> {
    let mut cache = TaskCache::new();
    look(&mut cache, unwinder, memory).unwrap();
    stacks(&cache, unwinder, memory)
}

#[test]
fn any_change_of_a_task_is_seen() {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let good = memory();
    let mut compared = 0;
    for task in 0..5 {
        for word in (0..TASK_SIZE).step_by(8) {
            for value in [0, 1, 7, u64::MAX, image::DIRECT + 0x100] {
                let mut cache = TaskCache::new();
                look(&mut cache, unwinder, &good).unwrap();
                stacks(&cache, unwinder, &good);
                let mut changes = vec![(task_at(task) + word, value)];
                if !BY_OTHERS.contains(&word) {
                    // What it only changes itself, it changes by running.
                    changes.push((task_at(task) + NVCSW, 7));
                }
                if LINKS.contains(&word) {
                    changes.push((variable("total_forks"), 1));
                }
                let changed = with(&changes);
                let listed =
                    introspect::task_list::read(kernel, &kernel.memory(&changed), &image::vcpus());
                let seen = look(&mut cache, unwinder, &changed);
                assert_eq!(
                    listed.is_ok(),
                    seen.is_ok(),
                    "task {task}, {word}: {value:#x}"
                );
                let Ok(listed) = listed else { continue };
                let tasks = cache.tasks().iter().map(|seen| &seen.task);
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
    look(&mut cache, unwinder, &good).unwrap();
    let before = stacks(&cache, unwinder, &good);
    assert!(before[2].is_reliable() && !before[2].frames.is_empty());

    // Its saved return address, which only it could change, and only by running.
    let saved = STACKS + STACK * 2 + STACK - 192 + 8;
    let behind_our_back = with(&[(saved, 0)]);
    look(&mut cache, unwinder, &behind_our_back).unwrap();
    assert_eq!(stacks(&cache, unwinder, &behind_our_back), before);

    let it_ran = with(&[(saved, 0), (task_at(2) + NVCSW, 1)]);
    look(&mut cache, unwinder, &it_ran).unwrap();
    let after = stacks(&cache, unwinder, &it_ran);
    assert!(!after[2].is_reliable());
    assert_eq!(after, fresh(unwinder, &it_ran));

    // What could not be relied on is walked again in any case.
    let mended = with(&[(task_at(2) + NVCSW, 1)]);
    look(&mut cache, unwinder, &mended).unwrap();
    assert_eq!(stacks(&cache, unwinder, &mended), before);
}

#[test]
fn a_task_that_comes_or_goes_is_seen_and_the_others_stacks_are_kept() {
    let unwinder = hostile_guest::unwinder();
    let good = memory();
    let mut cache = TaskCache::new();
    look(&mut cache, unwinder, &good).unwrap();
    let before = stacks(&cache, unwinder, &good);

    // The second thread of the last process goes, and the kernel counts one task less.
    let head = image::virt(image::signal_at(2));
    let count = variable("nr_threads");
    let saved = STACKS + STACK * 2 + STACK - 192 + 8;
    let gone = with(&[(task_at(2) + 88, head), (count, 2), (saved, 0)]);
    look(&mut cache, unwinder, &gone).unwrap();
    assert_eq!(cache.tasks().len(), 4);
    let kept = stacks(&cache, unwinder, &gone);
    assert_eq!(kept[1], before[1]);
    assert_eq!(kept[2], before[2]);

    look(&mut cache, unwinder, &good).unwrap();
    assert_eq!(cache.tasks().len(), 5);
    assert_eq!(stacks(&cache, unwinder, &good), before);
}

#[test]
fn new_knowledge_of_code_makes_the_stacks_with_it_new_and_no_others() {
    let mut unwinder = hostile_guest::unwinder().clone();
    let good = memory();
    let mut cache = TaskCache::new();
    look(&mut cache, &unwinder, &good).unwrap();
    let before = stacks(&cache, &unwinder, &good);
    let is_known = |cache: &TaskCache| -> Vec<bool> {
        let all = cache.tasks().iter();
        all.map(|seen| seen.is_walked()).collect()
    };
    let mut nothing_new = cache.clone();
    look(&mut nothing_new, &unwinder, &good).unwrap();
    let known = is_known(&nothing_new);
    assert!(known[2] && known.iter().filter(|known| **known).count() > 1);

    let nobodys = GvaRange::new(Gva(image::virt(0)), Gva(image::virt(16)));
    unwinder.add_transient(nobodys);
    unwinder.remove_transient(nobodys);
    look(&mut cache, &unwinder, &good).unwrap();
    assert_eq!(is_known(&cache), known);

    for frame in &before[2].frames {
        // Its last byte is the call that the frame is in.
        let code = GvaRange::new(frame.ip.sub(8), frame.ip);
        unwinder.add_transient(code);
        look(&mut cache, &unwinder, &good).unwrap();
        assert!(!is_known(&cache)[2]);
        let now = stacks(&cache, &unwinder, &good);
        assert!(!now[2].is_reliable());
        assert_eq!(now, fresh(&unwinder, &good));
        unwinder.remove_transient(code);
        look(&mut cache, &unwinder, &good).unwrap();
        assert_eq!(stacks(&cache, &unwinder, &good), before);
    }
}

#[test]
fn a_walk_ahead_is_made_sure_of() {
    let (kernel, unwinder) = (hostile_guest::kernel(), hostile_guest::unwinder());
    let good = memory();
    let expected = fresh(unwinder, &good);
    let pids = with(&[
        (task_at(3) + PID, 77),
        (task_at(3) + NVCSW, 8),
        (task_at(2) + NVCSW, 9),
    ]);
    for ahead in [&good, &pids] {
        let mut cache = TaskCache::new();
        cache.prewalk(kernel, unwinder, &kernel.memory(ahead));
        look(&mut cache, unwinder, &good).unwrap();
        assert_eq!(stacks(&cache, unwinder, &good), expected);
        assert_eq!(cache.tasks()[3].task.pid, 3);
    }
}
