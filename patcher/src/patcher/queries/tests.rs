//! Queries of a synthetic guest that holds a lock, or has started another kernel.

use std::cell::Cell;
use std::rc::Rc;

use hostile_guest::image::{self, COUNTS, SECOND_RELEASE, vcpus_of_two_kernels};
use hostile_guest::mutate::Mutated;
use introspect::{Frame, Gva, GvaRange, VcpuRegs};
use vm_memory::GuestAddress;

use crate::error::{ErrorKind, PatchError};
use crate::guest::code_set::CodeName;
use crate::machine::read_only::ReadOnlyMachine;
use crate::machine::{Machine, MachineError};
use crate::patcher::Patcher;

/// The physical address of `tasklist_lock`, and its value with a writer.
const HELD: (usize, u64) = (image::IMAGE + 0x2_0090, 0xff);

/// The synthetic guest as one that runs, in which only what a test changes changes.
struct Running<F: FnMut(&mut Mutated<'static>, &mut Vec<VcpuRegs>)> {
    memory: Mutated<'static>,
    vcpus: Vec<VcpuRegs>,
    /// What the guest does before each pause.
    runs: F,
}

impl<F: FnMut(&mut Mutated<'static>, &mut Vec<VcpuRegs>)> Running<F> {
    fn new(changes: &[(usize, u64)], runs: F) -> Running<F> {
        let mut memory = Mutated::of(hostile_guest::ram());
        for (at, value) in changes {
            memory.set(*at, &value.to_le_bytes());
        }
        Running {
            memory,
            vcpus: image::vcpus(),
            runs,
        }
    }
}

impl<F: FnMut(&mut Mutated<'static>, &mut Vec<VcpuRegs>)> Machine for Running<F> {
    type Memory = Mutated<'static>;

    fn memory(&self) -> &Mutated<'static> {
        &self.memory
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        (self.runs)(&mut self.memory, &mut self.vcpus);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, _: GuestAddress, _: &[u8]) -> Result<(), MachineError> {
        panic!("a query writes")
    }

    fn add_hidden_memory(&mut self, _: u64) -> Result<GuestAddress, MachineError> {
        panic!("a query adds memory")
    }

    fn remove_hidden_memory(&mut self, _: GuestAddress) -> Result<(), MachineError> {
        panic!("a query removes memory")
    }

    fn interrupt(&mut self, _: u32, _: u8) -> Result<(), MachineError> {
        panic!("a query sends an interrupt")
    }
}

/// The physical address of a variable of the synthetic kernel.
fn variable(name: &str) -> usize {
    let at: Gva = hostile_guest::kernel().symbols.address(name).unwrap();
    usize::try_from(at.0 - image::BASE).unwrap() + image::IMAGE
}

fn quiet(_: &mut Mutated<'static>, _: &mut Vec<VcpuRegs>) {}

fn core(changes: &[(usize, u64)]) -> ReadOnlyMachine<Mutated<'static>> {
    ReadOnlyMachine::new(Running::new(changes, quiet).memory, image::vcpus())
}

/// What each query of tasks warns of.
fn warnings<M: Machine>(machine: &mut M) -> Result<Vec<Option<String>>, PatchError> {
    let mut patcher = Patcher::new();
    let tasks = patcher.tasks(machine)?;
    assert_eq!(tasks.value.len(), 5);
    let stacks = patcher.stacks(machine)?;
    assert_eq!(stacks.value.len(), 5);
    let stack = patcher.stack(machine, 1)?;
    assert_eq!(stack.value.task, tasks.value[1]);
    Ok(vec![tasks.warning, stacks.warning, stack.warning])
}

fn expect_warning<M: Machine>(machine: &mut M, words: &[&str]) {
    for warning in warnings(machine).unwrap() {
        let warning = warning.expect("a warning");
        let has = |word: &&str| warning.contains(*word);
        assert!(words.iter().all(has), "{warning}");
    }
}

fn expect_busy<M: Machine>(machine: &mut M) {
    match warnings(machine) {
        Err(PatchError::Busy { what, .. }) => assert!(what.contains("tasklist_lock"), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_core_is_read_whatever_lock_is_held_in_it() {
    assert_eq!(warnings(&mut core(&[])).unwrap(), [None, None, None]);
    expect_warning(&mut core(&[HELD]), &["tasklist_lock", "in a core file"]);
    // Also in the middle of a change of the lists that no lock shows.
    let miscounted = [(COUNTS[0].0, 2)];
    expect_warning(&mut core(&miscounted), &["4 tasks", "counts 3"]);
}

#[test]
fn a_guest_that_may_go_on_is_busy() {
    expect_busy(&mut Running::new(&[HELD], quiet));
    // Halted, as an idle CPU is.
    let mut idle = Running::new(&[HELD], quiet);
    idle.vcpus[0].rflags = 1 << 9;
    idle.vcpus[0].halted = true;
    expect_busy(&mut idle);
    // It had an oops once, and tasks start.
    let mut forks = 0;
    expect_busy(&mut Running::new(
        &[HELD, (variable("tainted_mask"), 1 << 7)],
        |memory, _| {
            forks += 1u64;
            memory.set(variable("total_forks"), &forks.to_le_bytes());
        },
    ));
    // All vCPUs are halted with interrupts off, and one is woken once.
    let mut pauses = 0;
    let mut woken = Running::new(&[HELD], move |_, vcpus| {
        pauses += 1;
        vcpus[0].rax = u64::from(pauses == 20);
    });
    woken.vcpus[0].halted = true;
    expect_busy(&mut woken);
}

#[test]
fn a_guest_that_cannot_go_on_is_read_with_a_warning() {
    let panicked = [HELD, (variable("panic_cpu"), 0)];
    expect_warning(
        &mut Running::new(&panicked, quiet),
        &["tasklist_lock", "panicked"],
    );

    let mut halted = Running::new(&[HELD], quiet);
    halted.vcpus[0].halted = true;
    expect_warning(
        &mut halted,
        &["tasklist_lock", "halted with interrupts off"],
    );

    let oops = [HELD, (variable("tainted_mask"), 1 << 7)];
    expect_warning(&mut Running::new(&oops, quiet), &["tasklist_lock", "oops"]);
}

#[test]
fn a_guest_that_has_panicked_is_known_as_one_and_not_changed() {
    let mut patcher = Patcher::new();
    let mut machine = Running::new(&[(variable("panic_cpu"), 0)], quiet);
    // The first call finds the kernel, and each later one looks at it.
    for found in [false, true] {
        let state = patcher.kernel_in_use(&mut machine).unwrap();
        assert_eq!(state.panicked, found);
    }
    let guest = patcher.guest.as_ref().unwrap();
    let refused = guest.check_not_panicked(machine.memory()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Ended, "{refused}");
    let mut up = Running::new(&[], quiet);
    let mut patcher = Patcher::new();
    for _ in 0..2 {
        assert!(!patcher.kernel_in_use(&mut up).unwrap().panicked);
    }
}

#[test]
fn frames_of_a_patch_are_named_by_it() {
    let machine = core(&[]);
    let vcpus = image::vcpus();
    let mut patcher = Patcher::new();
    patcher.tasks(&mut core(&[])).unwrap();
    let guest = patcher.guest.as_mut().unwrap();
    let view = guest.view_for_query(machine.memory(), &vcpus).unwrap();
    let patch = || "fix".to_owned();
    let name = "new_pause".to_owned();
    let names = [
        (
            CodeName::Function {
                name,
                patch: patch(),
            },
            "in new_pause+0x1a [fix]",
        ),
        (CodeName::Stubs(patch()), "in the entry stubs of fix"),
        (CodeName::Patch(patch()), "in the code of fix"),
    ];
    let start = Gva(image::BASE + 0x8000);
    for ((name, expected), at) in names.into_iter().zip((0..).step_by(0x100)) {
        let range = GvaRange::new(start.add(at), start.add(at + 0x100));
        let frame = Frame {
            ip: range.start.add(0x1a),
            sp: Gva::NULL,
            exact: false,
        };
        assert_eq!(view.describe_frame(&frame, range, &name), expected);
    }
}

#[test]
fn corrupt_lists_are_an_error_in_a_core_too() {
    let back = (image::task_at(2) + 72, image::virt(image::task_at(1) + 72));
    let error = warnings(&mut core(&[HELD, back])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Guest, "{error}");
}

/// Memory and vCPUs of a guest that has started another kernel with fewer CPUs.
fn two_kernels() -> (&'static [u8], Vec<VcpuRegs>) {
    (image::two_kernels().leak(), vcpus_of_two_kernels())
}

#[test]
fn a_core_with_a_vcpu_halted_in_the_old_kernel_is_read() {
    let (ram, vcpus) = two_kernels();
    let mut machine = ReadOnlyMachine::new(Mutated::of(ram), vcpus.clone());
    assert_eq!(warnings(&mut machine).unwrap(), [None, None, None]);
    let mut patcher = Patcher::new();
    let kernel = patcher.kernel_in_use(&mut machine).unwrap().kernel;
    assert_eq!(kernel.release, SECOND_RELEASE);
    // It is only read.
    let guest = patcher.guest.as_ref().unwrap();
    let refused = guest
        .check_can_change(machine.memory(), &vcpus)
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    assert!(!patcher.symbols(&mut machine).unwrap().is_empty());
    let (release, _) = patcher
        .hold(&mut machine, |kernel, _, _| {
            kernel.map(|kernel| kernel.release.clone())
        })
        .unwrap();
    assert_eq!(release.as_deref(), Some(SECOND_RELEASE));
}

/// A guest that runs the first kernel, and the second one from the moment that the flag is set.
fn kexec(
    started: &Rc<Cell<bool>>,
) -> Running<impl FnMut(&mut Mutated<'static>, &mut Vec<VcpuRegs>)> {
    let (ram, after) = two_kernels();
    let mut before = after.clone();
    before[0].rflags = 1 << 9;
    before[1].online = false;
    let is_started = Rc::clone(started);
    let runs = move |_: &mut Mutated<'static>, vcpus: &mut Vec<VcpuRegs>| {
        vcpus.clone_from(if is_started.get() { &after } else { &before });
    };
    let mut machine = Running::new(&[], runs);
    machine.memory = Mutated::of(ram);
    machine
}

#[test]
fn patches_that_were_lost_unseen_are_reported_once() {
    let mut patcher = Patcher::new();
    patcher.unreported = Some(PatchError::AnotherKernel("6.12.0-made-up".into()));
    let reported = patcher.tasks(&mut core(&[])).unwrap_err();
    assert!(
        matches!(reported, PatchError::AnotherKernel(_)),
        "{reported}"
    );
    patcher.tasks(&mut core(&[])).unwrap();
}

#[test]
fn every_query_finds_the_kernel_that_was_started_later() {
    for query in 0..5 {
        let started = Rc::new(Cell::new(false));
        let mut machine = kexec(&started);
        let mut patcher = Patcher::new();
        let first = patcher
            .kernel_in_use(&mut machine)
            .unwrap()
            .kernel
            .release
            .clone();
        assert_ne!(first, SECOND_RELEASE);
        started.set(true);
        match query {
            0 => drop(patcher.tasks(&mut machine).unwrap()),
            1 => drop(patcher.stacks(&mut machine).unwrap()),
            2 => drop(patcher.symbols(&mut machine).unwrap()),
            3 => assert!(!patcher.kernel_in_use(&mut machine).unwrap().panicked),
            _ => drop(patcher.hold(&mut machine, |kernel, _, _| {
                assert_eq!(kernel.unwrap().release, SECOND_RELEASE);
            })),
        }
        let kernel = patcher.kernel(&mut machine).unwrap();
        assert_eq!(kernel.release, SECOND_RELEASE, "query {query}");
    }
}
