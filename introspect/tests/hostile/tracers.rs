//! Records of return addresses that tracers have replaced, damaged: the stack is unreliable, soon.

use introspect::{Gva, Stack, Unreliable, Verdict};

use crate::with;
use hostile_guest::bounded;
use hostile_guest::image::{self, BASE, GRAPH, HOOK, RET_STACK, RETHOOK, task_at, virt};

/// Offsets in `struct task_struct`, and in `struct rethook_node`, as the synthetic BTF has them.
const RETHOOKS: usize = 192;
const RET_STACK_POINTER: usize = 200;
const CURR_RET_STACK: usize = 208;
const LLIST: usize = 16;
const RET_ADDR: usize = 32;
const FRAME: usize = 40;

/// The stack of task `n` with these words changed.
fn stack(n: usize, changes: &[(usize, u64)]) -> Stack {
    let memory = with(changes);
    let kernel = hostile_guest::kernel();
    let reader = kernel.memory(&memory);
    let mut unwinder = hostile_guest::unwinder().clone();
    unwinder.refresh(kernel, &reader).unwrap();
    let tasks = introspect::task_list::read(kernel, &reader, &image::vcpus()).unwrap();
    let task = tasks.iter().find(|task| task.addr == Gva(virt(task_at(n))));
    bounded("a stack", || unwinder.stack(&reader, task.unwrap(), None))
}

fn is_traced(stack: &Stack, trampoline: u64) -> bool {
    stack.verdict == Verdict::Unreliable(Unreliable::Traced(Gva(BASE + trampoline)))
}

#[test]
fn the_undamaged_addresses_are_recovered() {
    for n in [3, 4] {
        let stack = stack(n, &[]);
        assert!(stack.is_reliable(), "{stack:?}");
        let entry = Gva(BASE + image::FORK + 2);
        assert_eq!(stack.frames.last().map(|frame| frame.ip), Some(entry));
    }
}

#[test]
fn a_list_of_hooks_with_a_cycle_ends() {
    let to_itself = (RETHOOK + LLIST, virt(RETHOOK + LLIST));
    assert!(is_traced(&stack(3, &[to_itself]), HOOK), "one is left");
    let endless = [to_itself, (RETHOOK + RET_ADDR, BASE + HOOK)];
    assert!(is_traced(&stack(3, &endless), HOOK));
}

#[test]
fn hooks_that_do_not_fit_the_stack() {
    let head = task_at(3) + RETHOOKS;
    let changes = [
        (head, 0),
        (head, 7),
        (head, u64::MAX),
        (head, 0x8000_0000_0000_0000),
        (head, virt(RETHOOK)),
        (RETHOOK + LLIST, 1),
        (RETHOOK + FRAME, 0),
        (RETHOOK + FRAME, u64::MAX),
    ];
    for change in changes {
        let stack = stack(3, &[change]);
        assert!(is_traced(&stack, HOOK), "{change:x?}: {stack:?}");
    }
    for ret in [0, u64::MAX, virt(RETHOOK)] {
        let stack = stack(3, &[(RETHOOK + RET_ADDR, ret)]);
        let not_text = Verdict::Unreliable(Unreliable::NotText(Gva(ret)));
        assert_eq!(stack.verdict, not_text);
    }
}

#[test]
fn records_of_the_graph_tracer_that_do_not_fit_the_stack() {
    let current = task_at(4) + CURR_RET_STACK;
    let pointer = task_at(4) + RET_STACK_POINTER;
    let word = RET_STACK + 24;
    let changes = [
        (current, 0),
        (current, 3),
        (current, 5),
        (current, 4097),
        (current, 0x7fff_ffff),
        (current, 0xffff_ffff),
        (current, 0x8000_0000),
        (pointer, 0),
        (pointer, u64::MAX),
        (pointer, virt(RET_STACK + 8)),
        (word, 0),
        (word, 3),
        (word, u64::MAX),
        (word, 1 << 12 | 1 << 10 | 2),
        (word, 1 << 12 | 1 << 10 | 4),
        (word, 1 << 12 | 2 << 10 | 3),
        (RET_STACK + 16, 0),
    ];
    for change in changes {
        let stack = stack(4, &[change]);
        assert!(is_traced(&stack, GRAPH), "{change:x?}: {stack:?}");
    }
}
