//! A synthetic guest to corrupt, and the bodies of introspect's fuzz targets: one function for each
//! parser of guest memory.
//!
//! `introspect/tests/hostile/` calls the same functions with seeds and past findings. Each takes
//! any bytes, and none may panic, run for long or allocate much; the returned number says how far
//! it got.

#![allow(
    clippy::cast_possible_truncation,
    reason = "all numbers are of the synthetic guest"
)]

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use introspect::internals;
use introspect::modules::list;
use introspect::modules::modules_and_runtime;
use introspect::task_list::TaskCache;
use introspect::unwind::OrcEncoding;
use introspect::unwind::OrcTable;
use introspect::{
    AddressSpace, CoreFile, Gva, GvaRange, Kernel, KernelMemory, Layout, PhysMemory, Task,
    Unwinder, VcpuRegs,
};
use vm_memory::GuestAddress;

pub mod allocations;
pub mod btf;
pub mod cores;
pub mod dump;
pub mod image;
pub mod mutate;
pub mod symbols;

use mutate::{Mutated, PARTS, Part};

/// No input may make introspection hold more than this at once, in bytes: the image has 4 MiB, and
/// tables with limits of their own are smaller still.
pub const MAX_BYTES: usize = 64 << 20;

/// No input may take longer than this.
pub const MAX_TIME: Duration = Duration::from_secs(2);

/// Runs `work`, and checks how much it allocates and how long it runs.
///
/// # Panics
/// If it held [`MAX_BYTES`] at once or more, or ran for [`MAX_TIME`] or longer.
pub fn bounded<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = cpu_time();
    let (out, peak) = allocations::measured(work);
    let elapsed = cpu_time() - start;
    assert!(peak < MAX_BYTES, "{what} held {peak} bytes at once");
    assert!(elapsed < MAX_TIME, "{what} took {elapsed:?}");
    out
}

/// The CPU time of this thread so far (`Documentation/scheduler/sched-stats.rst`): other load on
/// the machine must not count against an input.
pub fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ran = stat.split(' ').next().and_then(|ran| ran.parse().ok());
    Duration::from_nanos(ran.expect("a kernel with schedstats"))
}

/// A fuzz target: it returns how far it got.
pub type Target = fn(&[u8]) -> usize;

/// Every target with its name.
pub const TARGETS: [(&str, Target); 8] = [
    ("kallsyms", kallsyms),
    ("btf", types),
    ("orc", orc),
    ("page_tables", page_tables),
    ("tasks", tasks),
    ("modules", modules),
    ("core_file", core_file),
    ("whole", whole),
];

/// The memory of the synthetic guest, undamaged.
pub fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(image::build)
}

/// The synthetic guest's kernel.
pub fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let memory = Mutated::new(ram(), &PARTS, &[]);
        Kernel::find(&memory, &image::vcpus()).expect("the synthetic guest has a kernel")
    })
}

/// The unwinder of the synthetic guest.
pub fn unwinder() -> &'static Unwinder {
    static UNWINDER: OnceLock<Unwinder> = OnceLock::new();
    UNWINDER.get_or_init(|| {
        let memory = Mutated::new(ram(), &PARTS, &[]);
        Unwinder::new(kernel(), &kernel().memory(&memory))
            .expect("the synthetic guest has unwind data")
    })
}

/// Builds or opens the guests, so that the time it takes does not count against an input.
pub fn prepare() {
    unwinder();
    dump::named();
}

/// Symbols: after `R`, the bytes are the image; otherwise they are where the good tables are cut
/// off, and damage to them.
pub fn kallsyms(data: &[u8]) -> usize {
    let start = Gva(image::BASE + image::KALLSYMS as u64);
    let covers = GvaRange::new(Gva(image::BASE), Gva(image::BASE).add(2 << 20));
    let mut good = vec![0; 0x4_0000];
    let bytes = match data {
        [b'R', raw @ ..] => raw,
        [a, b, damage @ ..] => {
            let tables = image::IMAGE + image::KALLSYMS;
            let parts = [(tables, good.len())];
            let memory = Mutated::new(ram(), &parts, damage);
            let _ = memory.read(GuestAddress(tables as u64), &mut good);
            let cut = 4 * usize::from(u16::from_le_bytes([*a, *b]));
            &good[..good.len() - cut.min(good.len())]
        }
        _ => return 0,
    };
    let window = internals::kallsyms::ImagePart { start, bytes };
    internals::kallsyms::parse(window, covers).map_or(0, |symbols| {
        symbols
            .iter()
            .step_by(97)
            .filter(|symbol| {
                symbols.at(symbol.gva).is_some() && symbols.unique(symbol.name).is_ok()
            })
            .count()
    })
}

/// Types: the bytes are a `.BTF` section.
pub fn types(data: &[u8]) -> usize {
    let Ok(btf) = introspect::Btf::parse(data.to_vec()) else {
        return 0;
    };
    let percpu = btf.percpu_vars().take(1000).count();
    1 + percpu + usize::from(Layout::resolve(&btf).is_ok())
}

/// Unwind data: the address of the table, how many of the bytes are addresses, and the two arrays.
pub fn orc(data: &[u8]) -> usize {
    let Some((&[at @ .., low, high], rest)) = data.split_first_chunk::<10>() else {
        return 0;
    };
    let at = Gva(u64::from_le_bytes(at));
    let len = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (ips, entries) = rest.split_at(len);
    let detected = internals::orc::detect(entries.as_chunks().0);
    let mut built = usize::from(detected.is_some());
    for encoding in OrcEncoding::ALL {
        if let Ok(table) = OrcTable::from_sections(at, ips, entries, encoding) {
            let ends = table.iter().flat_map(|(ip, _)| [ip.sub(1), ip, ip.add(1)]);
            built += ends.filter(|ip| table.lookup(*ip).is_some()).count();
        }
    }
    built
}

/// Page tables: the number of levels, where the tables are, an address, and all memory from
/// physical 0 on.
pub fn page_tables(data: &[u8]) -> usize {
    let Some((&[levels, page, gva @ ..], rest)) = data.split_first_chunk::<10>() else {
        return 0;
    };
    let memory = Mutated::new(rest, &PARTS, &[]);
    let space = AddressSpace {
        root: GuestAddress(u64::from(page) << 12),
        levels: 4 + (levels & 1),
    };
    let gva = Gva(u64::from_le_bytes(gva));
    let reader = KernelMemory::new(&memory, space);
    let mut found = 0;
    for near in [gva, gva.sub(8), gva.add(0x1000), gva.add(2 << 20)] {
        found += usize::from(space.translate(&memory, near).is_ok());
        found += usize::from(reader.cstr(near, 0x3000).is_ok());
        found += usize::from(reader.bytes(near, 0x5000, 1 << 16).is_ok());
    }
    found
}

/// The lists of tasks: damage to them and to what is around them.
pub fn tasks(data: &[u8]) -> usize {
    let memory = Mutated::new(ram(), &PARTS[..3], data);
    let reader = kernel().memory(&memory);
    let found = introspect::task_list::read(kernel(), &reader, &image::vcpus());
    let vcpus = image::vcpus();
    // What may be in the middle of a change is read the same where nothing shows that it is.
    match TaskCache::read_in_mid_change(kernel(), &reader, &vcpus) {
        Ok((cache, doubts)) if doubts.is_empty() => {
            let tasks = cache.tasks().iter().map(|cached| &cached.task);
            assert!(found.iter().flatten().eq(tasks), "{found:?}");
        }
        _ => assert!(found.is_err(), "refused only where it could be read"),
    }
    let mut cache = TaskCache::new();
    let refresh = |cache: &mut TaskCache, memory: &dyn PhysMemory| {
        cache.refresh(kernel(), unwinder(), &kernel().memory(memory), &vcpus)
    };
    let good = Mutated::new(ram(), &PARTS, &[]);
    let _ = refresh(&mut cache, &good);
    let before: Vec<Task> = cache
        .tasks()
        .iter()
        .map(|cached| cached.task.clone())
        .collect();
    let result = refresh(&mut cache, &memory);
    // The cache does not read the links of the lists again while the kernel's counts of tasks are
    // the same: no kernel changes the links alone.
    let lists = |memory| contents(memory, image::list_words());
    let counts = |memory| contents(memory, image::COUNTS);
    if let (Ok(found), Ok(())) = (&found, result)
        && (lists(&memory) == lists(&good) || counts(&memory) != counts(&good))
    {
        let cached = cache.tasks();
        assert_eq!(cached.len(), found.len(), "the cache has other tasks");
        for (cached, found) in cached.iter().map(|cached| &cached.task).zip(found) {
            let kept = || {
                before
                    .iter()
                    .any(|old| changed_by_itself(old) == changed_by_itself(cached))
                    && changed_by_others(cached) == changed_by_others(found)
            };
            assert!(
                cached == found || kept(),
                "the cache has {cached:?} instead of {found:?}"
            );
        }
    }
    found.map_or(0, |tasks| tasks.len())
}

/// The contents of memory in each of these parts, where there is memory.
fn contents(
    memory: &dyn PhysMemory,
    parts: impl IntoIterator<Item = Part>,
) -> Vec<Option<Vec<u8>>> {
    let read = |(at, len)| {
        let mut bytes = vec![0; len];
        let done = memory.read(GuestAddress(at as u64), &mut bytes);
        done.ok().map(|()| bytes)
    };
    parts.into_iter().map(read).collect()
}

/// The fields that only the task itself changes, by running: the cache does not read them again
/// while the task has not run.
fn changed_by_itself(task: &Task) -> impl PartialEq {
    let Task {
        addr,
        pid,
        tgid,
        sp,
        ..
    } = *task;
    (addr, pid, tgid, sp, task.exit_state, task.comm.clone())
}

/// The fields that other code changes, and which vCPU runs it: the cache compares these.
fn changed_by_others(task: &Task) -> impl PartialEq {
    let Task {
        addr,
        tif,
        cpu,
        vcpu,
        ..
    } = *task;
    let Task {
        state,
        flags,
        stack,
        ..
    } = *task;
    (
        addr,
        tif,
        cpu,
        vcpu,
        state,
        flags,
        stack,
        task.on_cpu,
        task.patch_state,
    )
}

/// The list of modules, their symbols and their unwind data: damage to them.
pub fn modules(data: &[u8]) -> usize {
    let memory = Mutated::new(ram(), &PARTS[3..4], data);
    let good = Mutated::new(ram(), &PARTS, &[]);
    let reader = kernel().memory(&memory);
    let Ok(mut unwinder) = Unwinder::new(kernel(), &reader) else {
        return 0;
    };
    // Modules that are loaded, change and are unloaded.
    let mut seen = usize::from(unwinder.refresh(kernel(), &reader).is_ok());
    let _ = unwinder.refresh(kernel(), &kernel().memory(&good));
    seen += usize::from(unwinder.refresh(kernel(), &reader).is_ok());
    for module in list(kernel(), &reader).unwrap_or_default().iter().take(8) {
        if let Ok(symbols) = module.symbols(kernel(), &reader) {
            seen += symbols
                .iter()
                .filter(|s| symbols.at(s.gva).is_some())
                .count();
        }
    }
    seen + modules_and_runtime(kernel(), &reader).map_or(0, |listed| listed.len())
}

/// A core file: the bytes are the file.
pub fn core_file(data: &[u8]) -> usize {
    let Ok(core) = CoreFile::new(cores::file(data)) else {
        return 0;
    };
    1 + cores::edges(&core) + stacks(&core, core.vcpus())
}

/// Everything: damage anywhere, then from the registers of a vCPU to every stack. The guest is a
/// real one if the environment names one.
pub fn whole(data: &[u8]) -> usize {
    if let Some(dump) = dump::named() {
        return dump.damaged(data);
    }
    let memory = Mutated::new(ram(), &PARTS, data);
    stacks(&memory, &image::vcpus())
}

/// How many stacks of a guest are reliable.
pub fn stacks(memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> usize {
    let Ok(kernel) = Kernel::find(memory, vcpus) else {
        return 0;
    };
    stacks_of(&kernel, memory, vcpus)
}

/// As [`stacks`], for a guest whose kernel is known.
pub fn stacks_of(kernel: &Kernel, memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> usize {
    let unwinder = Unwinder::new(kernel, &kernel.memory(memory));
    unwinder.map_or(0, |unwinder| walk(kernel, unwinder, memory, vcpus))
}

/// As [`stacks_of`], with the unwinder at hand.
pub fn walk(
    kernel: &Kernel,
    mut unwinder: Unwinder,
    memory: &dyn PhysMemory,
    vcpus: &[VcpuRegs],
) -> usize {
    let reader = kernel.memory(memory);
    let Ok(tasks) = introspect::task_list::read(kernel, &reader, vcpus) else {
        return 0;
    };
    let _ = unwinder.refresh(kernel, &reader);
    // The results do not matter here: `modules` counts them.
    let _ = (
        modules_and_runtime(kernel, &reader),
        kernel.vmcoreinfo(&reader),
    );
    tasks
        .iter()
        .filter(|task| {
            let regs = task.vcpu.and_then(|n| vcpus.get(n as usize));
            unwinder.stack(&reader, task, regs).is_reliable()
        })
        .count()
}
