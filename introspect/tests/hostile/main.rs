//! A hostile guest: whatever is in its memory, introspection ends soon and allocates little.
//!
//! This module replays every seed and every past finding of the fuzzers (`fuzz/`), and breaks each
//! structure on purpose.

use std::fs;
use std::path::{Path, PathBuf};

use introspect::internals::kallsyms::{self, ImagePart, KallsymsError};
use introspect::modules::{self, ModulesError};
use introspect::modules::{ListingError, modules_and_runtime};
use introspect::unwind::OrcEncoding;
use introspect::unwind::{OrcTable, OrcTableError};
use introspect::{
    AddressSpace, Btf, BtfError, FindError, Gva, GvaRange, Kernel, KernelMemory, PhysMemory,
    TasksError, Unwinder,
};
use vm_memory::GuestAddress;

use hostile_guest::bounded;
use hostile_guest::image::{self, module_at, signal_at, task_at, virt};
use hostile_guest::mutate::{Mutated, PARTS};

mod changing;
mod cores;
mod largest;
mod mid_change;
mod task_cache;
mod tracers;
mod two_kernels;

/// Offsets in `struct task_struct`, `struct module` and `struct mod_kallsyms`, as the synthetic BTF
/// has them.
const TASKS: usize = 72;
const THREAD_NODE: usize = 88;
const SIGNAL: usize = 112;
const LIST: usize = 8;
const ORC_COUNT: usize = 200;

fn memory() -> Mutated<'static> {
    Mutated::new(hostile_guest::ram(), &PARTS, &[])
}

/// The good guest with some words changed.
fn with(changes: &[(usize, u64)]) -> Mutated<'static> {
    let mut memory = memory();
    for (at, value) in changes {
        memory.set(*at, &value.to_le_bytes());
    }
    memory
}

fn tasks_with(changes: &[(usize, u64)]) -> Result<usize, TasksError> {
    let memory = with(changes);
    let kernel = hostile_guest::kernel();
    bounded("tasks", || {
        introspect::task_list::read(kernel, &kernel.memory(&memory), &image::vcpus())
            .map(|list| list.len())
    })
}

fn modules_with(changes: &[(usize, u64)]) -> Result<usize, ModulesError> {
    let memory = with(changes);
    let kernel = hostile_guest::kernel();
    bounded("modules", || {
        modules::list(kernel, &kernel.memory(&memory)).map(|list| list.len())
    })
}

fn files(kind: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    fs::read_dir(folder.join(kind).join(target))
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[test]
fn every_seed_and_every_past_finding_keeps_the_bounds() {
    hostile_guest::kernel();
    for (target, run) in hostile_guest::TARGETS {
        let seeds = files("seeds", target);
        assert!(!seeds.is_empty(), "{target} has no seeds");
        for path in seeds.into_iter().chain(files("regressions", target)) {
            let bytes = fs::read(&path).unwrap();
            bounded(&path.display().to_string(), || run(&bytes));
        }
    }
}

#[test]
fn all_of_the_undamaged_guest_is_found() {
    assert_eq!(hostile_guest::tasks(&[]), 5);
    assert_eq!(hostile_guest::modules(&[]), 9);
    assert_eq!(hostile_guest::whole(&[]), 5);
}

#[test]
fn a_list_of_tasks_that_loops_past_init_task() {
    let to = |n: usize| virt(task_at(n) + TASKS);
    let looped = tasks_with(&[(task_at(2) + TASKS, to(1))]);
    assert!(matches!(looped, Err(TasksError::Cycle(_))), "{looped:?}");
    let itself = tasks_with(&[(task_at(1) + TASKS, to(1))]);
    assert!(matches!(itself, Err(TasksError::Cycle(_))), "{itself:?}");
}

#[test]
fn a_list_of_threads_that_points_at_itself() {
    let node = |n: usize| task_at(n) + THREAD_NODE;
    let itself = tasks_with(&[(node(2), virt(node(2)))]);
    let leaderless = |found: &Result<_, _>| matches!(found, Err(TasksError::Leaderless(_)));
    assert!(leaderless(&itself), "{itself:?}");
    let headless = tasks_with(&[(task_at(2) + SIGNAL, 0x8000_0000_0000_0000)]);
    assert!(leaderless(&headless), "{headless:?}");
    let empty = tasks_with(&[(signal_at(2), virt(signal_at(2)))]);
    assert!(leaderless(&empty), "{empty:?}");
    let another = tasks_with(&[(task_at(2) + SIGNAL, virt(signal_at(1)))]);
    assert!(leaderless(&another), "{another:?}");
}

#[test]
fn lists_that_leave_guest_memory() {
    for (at, value) in [
        (task_at(1) + TASKS, 0),
        (task_at(1) + TASKS, u64::MAX),
        (signal_at(2), 0x8000_0000_0000_0000),
        (task_at(2) + THREAD_NODE, image::DIRECT + (64 << 20)),
    ] {
        let found = tasks_with(&[(at, value)]);
        assert!(matches!(found, Err(TasksError::Read(_))), "{found:?}");
        let found = modules_with(&[(module_at(0) + LIST, value)]);
        assert!(matches!(found, Err(ModulesError::Read(_))), "{found:?}");
    }
}

#[test]
fn a_list_of_modules_that_loops() {
    let to = |n: usize| virt(module_at(n) + LIST);
    for next in [to(0), to(1)] {
        let looped = modules_with(&[(module_at(1) + LIST, next)]);
        assert!(
            matches!(looped, Err(ModulesError::Endless(_))),
            "{looped:?}"
        );
    }
}

#[test]
fn page_tables_that_point_at_themselves() {
    let root = image::IMAGE + image::TABLES;
    let entries: Vec<_> = (0..512).map(|n| (root + 8 * n, root as u64 | 3)).collect();
    let memory = with(&entries);
    for levels in [4, 5] {
        let space = AddressSpace {
            root: GuestAddress(root as u64),
            levels,
        };
        let reader = KernelMemory::new(&memory, space);
        bounded("page tables", || {
            assert_eq!(reader.u64(Gva(0)), Ok(root as u64 | 3));
            assert_eq!(
                reader.bytes(Gva(0), 8 << 20, 8 << 20).unwrap().len(),
                8 << 20
            );
        });
    }
    let found = bounded("find", || Kernel::find(&memory, &image::vcpus()));
    assert!(
        matches!(found, Err(FindError::Kallsyms { .. })),
        "{found:?}"
    );
}

#[test]
fn kallsyms_cut_anywhere() {
    let start = image::IMAGE + image::KALLSYMS;
    let mut whole = vec![0; 0x4_0000];
    memory()
        .read(GuestAddress(start as u64), &mut whole)
        .unwrap();
    let covers = GvaRange::new(Gva(image::BASE), Gva(image::BASE).add(2 << 20));
    let parse = |bytes: &[u8]| {
        let start = Gva(virt(start));
        let window = ImagePart { start, bytes };
        bounded("kallsyms", || {
            kallsyms::parse(window, covers).map(|s| s.len())
        })
    };
    let all = parse(&whole).unwrap();
    let digits = kallsyms::digits(&whole, 0).unwrap();
    let end = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    // In the count, the names, the markers, the tokens, their index, the offsets and the base.
    for cut in [
        2,
        0x1000,
        digits - 0x200,
        digits + 4,
        digits + 0x300,
        end - 0x800,
        end - 4,
    ] {
        assert!(parse(&whole[..cut]).is_err(), "cut at {cut:#x}");
    }
    assert_eq!(parse(&whole[..end]), Ok(all));
    for from in [8, 0x1000, digits - 0x200, digits + 1] {
        assert!(parse(&whole[from..]).is_err(), "from {from:#x}");
    }
    assert_eq!(parse(&[]), Err(KallsymsError::NoTokens));
}

/// A `.BTF` section of these words, with the strings `\0a\0`.
fn btf(types: &[u32]) -> Result<Btf, BtfError> {
    let len = u32::try_from(4 * types.len()).unwrap();
    let words = [0x0001_eb9f, 24, 0, len, len, 3];
    let mut bytes: Vec<u8> = words
        .iter()
        .chain(types)
        .flat_map(|w| w.to_le_bytes())
        .collect();
    bytes.extend(b"\0a\0");
    bounded("BTF", || Btf::parse(bytes))
}

#[test]
fn btf_with_cycles() {
    // struct a { struct a; } by an unnamed member; typedefs of each other; an array of itself.
    let inside_itself = btf(&[1, 4 << 24 | 1, 8, 0, 1, 0]).unwrap();
    let typedefs = btf(&[1, 4 << 24 | 1, 8, 1, 2, 0, 0, 8 << 24, 3, 0, 8 << 24, 2]).unwrap();
    let array = btf(&[1, 4 << 24 | 1, 8, 1, 2, 0, 0, 3 << 24, 0, 2, 2, u32::MAX]).unwrap();
    for (types, path) in [(inside_itself, "a.b"), (typedefs, "a.a"), (array, "a.a")] {
        let found = bounded(path, || types.member(path));
        assert!(matches!(found, Err(BtfError::Malformed(_))), "{found:?}");
    }
}

#[test]
fn btf_with_more_members_than_bytes() {
    for kind in [4, 5, 6, 13, 15, 19] {
        let found = btf(&[1, kind << 24 | 0xffff, 8, 0, 0, 0]);
        assert!(matches!(found, Err(BtfError::Truncated(1))), "{found:?}");
    }
}

#[test]
fn orc_tables_that_no_kernel_has() {
    const CALL: [u8; 6] = [8, 0, 0, 0, 5, 2];
    let build = |ips: &[i32], bytes: usize, entries: usize| {
        let ips: Vec<u8> = ips
            .iter()
            .flat_map(|ip| ip.to_le_bytes())
            .take(bytes)
            .collect();
        let table =
            OrcTable::from_sections(Gva(0), &ips, &CALL.repeat(entries), OrcEncoding::Typed);
        table.map(|table| table.len())
    };
    assert_eq!(build(&[0x10, 0x10, 0x10], 12, 3), Ok(3));
    assert_eq!(build(&[0x20, 0x10], 8, 2), Err(OrcTableError::Unsorted(1)));
    assert_eq!(
        build(&[i32::MIN, i32::MAX], 8, 2),
        Err(OrcTableError::Unsorted(1))
    );
    // The remainder of an odd length is no entry.
    assert_eq!(build(&[0x10, 0x20], 7, 1), Ok(1));
    assert_eq!(
        build(&[0x10, 0x20], 7, 2),
        Err(OrcTableError::Mismatch { ips: 1, entries: 2 })
    );
}

#[test]
fn modules_do_not_determine_how_much_is_allocated() {
    let mut memory = memory();
    for n in 0..2 {
        memory.set(module_at(n) + ORC_COUNT, &u32::MAX.to_le_bytes());
        memory.set(module_at(n) + 0x208, &u32::MAX.to_le_bytes());
    }
    let kernel = hostile_guest::kernel();
    let reader = kernel.memory(&memory);
    let mut unwinder = Unwinder::new(kernel, &reader).unwrap();
    bounded("modules", || {
        unwinder.refresh(kernel, &reader).unwrap();
        for module in modules::list(kernel, &reader).unwrap() {
            assert!(module.symbols(kernel, &reader).is_err());
        }
    });
}

#[test]
fn lists_of_runtime_code_that_loop() {
    let kernel = hostile_guest::kernel();
    // The links of ftrace's, of BPF's and of a kprobe's entry.
    for link in [
        image::RUNTIME_CODE,
        image::RUNTIME_CODE + 0x408,
        image::RUNTIME_CODE + 0x800,
    ] {
        let memory = with(&[(link, virt(link))]);
        let found = bounded("a listing", || {
            modules_and_runtime(kernel, &kernel.memory(&memory))
        });
        assert!(
            matches!(found, Err(ListingError::Endless { .. })),
            "{found:?}"
        );
        let memory = with(&[(link, 0)]);
        let found = bounded("a listing", || {
            modules_and_runtime(kernel, &kernel.memory(&memory))
        });
        assert!(matches!(found, Err(ListingError::Read(_))), "{found:?}");
    }
}

#[test]
fn tasks_that_overlap_are_listed_in_time() {
    // Each word is a link to the next, so there is a task at every eighth byte.
    const LINKS: usize = 1 << 17;
    let mut ram = hostile_guest::ram().to_vec();
    let chain = |n: usize| (1 << 20) + 8 * n;
    let mut put = |at: usize, value: u64| ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
    for n in 0..LINKS - 32 {
        put(chain(n), virt(chain(n + 1)));
    }
    put(signal_at(1), virt(chain(16)));
    let memory = Mutated::new(&ram, &PARTS, &[]);
    let kernel = hostile_guest::kernel();
    let found = bounded("tasks", || {
        introspect::task_list::read(kernel, &kernel.memory(&memory), &image::vcpus())
    });
    assert!(found.is_err());
}

#[test]
fn modules_that_share_one_table_do_not_multiply_it() {
    const MODULES: usize = 512;
    let mut ram = hostile_guest::ram().to_vec();
    let mut put = |at: usize, value: u64| ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let at = |n: usize| (1 << 20) + 0x100 * n;
    put(image::MODULES_HEAD, virt(at(0) + LIST));
    for n in 0..MODULES {
        let next = if n + 1 < MODULES {
            at(n + 1) + LIST
        } else {
            image::MODULES_HEAD
        };
        put(at(n) + LIST, virt(next));
        put(at(n) + 80, 0xffff_ffff_c000_0000 + 0x1000 * n as u64);
        put(at(n) + 88, 0x1000);
        put(at(n) + ORC_COUNT, 60_000);
        put(at(n) + ORC_COUNT + 8, virt(at(MODULES)));
        put(at(n) + ORC_COUNT + 16, virt(at(MODULES)));
    }
    let memory = Mutated::new(&ram, &PARTS, &[]);
    let kernel = hostile_guest::kernel();
    let reader = kernel.memory(&memory);
    let mut unwinder = Unwinder::new(kernel, &reader).unwrap();
    let good = self::memory();
    bounded("modules", || {
        assert_eq!(modules::list(kernel, &reader).unwrap().len(), MODULES);
        unwinder.refresh(kernel, &reader).unwrap();
        unwinder.refresh(kernel, &kernel.memory(&good)).unwrap();
        unwinder.refresh(kernel, &reader).unwrap();
    });
}
