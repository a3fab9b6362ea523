//! The memory of the synthetic guest: 4 MiB with just enough of a kernel. It has an image, four
//! tasks on the lists and an idle task, two modules, and stacks that can be walked to their ends.

use introspect::VcpuRegs;
use introspect::x86::{CR0_PG, EFER_LMA};

use super::mutate::Part;
use super::{btf, symbols};

/// Bytes of guest memory, from physical 0 on.
pub const RAM: usize = 4 << 20;
/// The physical address of the image, and its virtual one, which is `_text`.
pub const IMAGE: usize = 2 << 20;
pub const BASE: u64 = 0xffff_ffff_8100_0000;
/// Where the memory below the image is in the direct map.
pub const DIRECT: u64 = 0xffff_8880_0000_0000;

// Offsets in the image.
pub const FORK: u64 = 0x400;
pub const SYSCALL: u64 = 0x600;
const UPDATE: u64 = 0x700;
/// The trampoline of the function graph tracer, and that of kretprobes.
pub const GRAPH: u64 = 0x580;
pub const HOOK: u64 = 0x5c0;
const FILL: u64 = 0x8000;
pub const DATA: usize = 0x2_0000;
const PHYS_BASE: usize = DATA;
const BANNER: usize = DATA + 0x20;
const NR_THREADS: u64 = 0x2_00a0;
const TOTAL_FORKS: u64 = 0x2_00a8;
const PANIC_CPU: u64 = 0x2_00c8;
const LISTS: u64 = 0x2_0300;
pub const INIT_TASK: u64 = 0x2_1000;
pub const TABLES: usize = 0x3_0000;
const INIT_STACK: u64 = 0x4_0000;
pub const BTF: usize = 0x5_0000;
pub const ORC: usize = 0x6_0000;
pub const KALLSYMS: usize = 0x8_0000;

// Physical addresses below the image.
pub const PERCPU: usize = 0x1_0000;
pub const TASKS: usize = 0x2_0000;
pub const MODULES: usize = 0x4_0000;
/// Structures that describe code generated at run time: for ftrace, for BPF and for a kprobe, 0x400
/// bytes each.
pub const RUNTIME_CODE: usize = MODULES + 0x9000;
const MODULE_TEXT: usize = 0x5_0000;
pub const STACKS: usize = 0x8_0000;
pub const STACK: usize = 0x4000;

const SYMBOLS: &[(&str, u64)] = &[
    ("_text", 0),
    ("_stext", 0),
    ("__entry_text_start", 0x80),
    ("__entry_text_end", 0xc0),
    ("schedule", 0x100),
    ("do_exit", 0x200),
    ("vfs_read", 0x300),
    ("ret_from_fork_asm", FORK),
    ("vfs_write", 0x500),
    ("return_to_handler", GRAPH),
    ("arch_rethook_trampoline", HOOK),
    ("entry_SYSCALL_64", SYSCALL),
    ("klp_update_patch_state", UPDATE),
    ("__sched_text_start", 0x780),
    ("__sched_text_end", 0x790),
    ("_etext", 0x1_0000),
    ("_sinittext", 0x1_1000),
    ("_einittext", 0x1_2000),
    ("phys_base", 0x2_0000),
    ("system_state", 0x2_0010),
    ("linux_banner", 0x2_0020),
    ("klp_target_state", 0x2_0080),
    ("tasklist_lock", 0x2_0090),
    ("nr_threads", NR_THREADS),
    ("total_forks", TOTAL_FORKS),
    ("modules", 0x2_00b0),
    ("tainted_mask", 0x2_00c0),
    ("panic_cpu", PANIC_CPU),
    ("__per_cpu_offset", 0x2_0100),
    ("__cpu_possible_mask", 0x2_0200),
    ("__cpu_online_mask", 0x2_0240),
    ("end_of_masks", 0x2_0280),
    ("ftrace_ops_trampoline_list", LISTS),
    ("bpf_kallsyms", LISTS + 0x10),
    ("kprobe_insn_slots", LISTS + 0x20),
    ("kprobe_optinsn_slots", LISTS + 0x40),
    ("bpf_jit_harden", LISTS + 0x60),
    ("bpf_jit_kallsyms", LISTS + 0x70),
    ("init_task", INIT_TASK),
    ("init_top_pgt", 0x3_0000),
    ("__start_init_stack", INIT_STACK),
    ("__end_init_stack", INIT_STACK + 0x4000),
    ("__start_BTF", 0x5_0000),
    ("_end", 0x20_0000),
];

/// Per-CPU symbols and their offsets in the per-CPU area.
const PERCPU_SYMBOLS: &[(&str, u64)] = &[
    ("__per_cpu_start", 0),
    ("idle_threads", 8),
    ("current_task", 16),
    ("hardirq_stack_ptr", 24),
    ("cea_exception_stacks", 32),
];

const CALL: [u8; 6] = [8, 0, 0, 0, 5, 2];
const END: [u8; 6] = [0, 0, 0, 0, 0, 1];
const REGS: [u8; 6] = [0, 0, 0, 0, 5, 3 | 8];
const ENTRIES: [(u64, [u8; 6]); 8] = [
    (0, CALL),
    (0x100, CALL),
    (0x200, CALL),
    (FORK, END),
    (0x500, CALL),
    (SYSCALL, REGS),
    (UPDATE, CALL),
    (0x1_1000, CALL),
];

/// Guest memory while it is built.
struct Builder(Vec<u8>);

impl Builder {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn long(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn word(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
}

/// The virtual address of physical memory in the direct map, or in the image.
pub fn virt(at: usize) -> u64 {
    match at.checked_sub(IMAGE) {
        Some(offset) => BASE + offset as u64,
        None => DIRECT + at as u64,
    }
}

/// The physical address of a task's `struct task_struct`: 0 is `init_task`, 4 the idle task of CPU
/// 1.
pub fn task_at(n: usize) -> usize {
    match n {
        0 => IMAGE + INIT_TASK as usize,
        n => TASKS + 0x100 * n,
    }
}

/// The physical address of a task's `struct signal_struct`.
pub fn signal_at(n: usize) -> usize {
    TASKS + 0x8000 + 0x20 * n
}

/// The words that link the lists of tasks: the next process, the next thread and the `signal`
/// pointer of each task, and the heads of the lists of threads.
pub fn list_words() -> impl Iterator<Item = Part> {
    let links = |n| [72, 88, 112].map(|offset| task_at(n) + offset);
    let places = (0..4).flat_map(links).chain((0..3).map(signal_at));
    places.map(|at| (at, 8))
}

/// The kernel's counts of tasks: `nr_threads`, an `int`, and `total_forks`, an `unsigned long`.
pub const COUNTS: [Part; 2] = [
    (IMAGE + NR_THREADS as usize, 4),
    (IMAGE + TOTAL_FORKS as usize, 8),
];

/// The physical address of a `struct module`.
pub fn module_at(n: usize) -> usize {
    MODULES + 0x1000 * n
}

/// The physical address of the `struct rethook_node` of task 3: a kretprobe has replaced the return
/// address of the outermost function on its stack.
pub const RETHOOK: usize = TASKS + 0x8400;
/// The physical address of the `ret_stack` of task 4: the function graph tracer has done the same.
pub const RET_STACK: usize = TASKS + 0x8800;

/// The physical address of the head of the list of modules.
pub const MODULES_HEAD: usize = IMAGE + 0x2_00b0;

/// Builds the memory.
pub fn build() -> Vec<u8> {
    let mut ram = Builder(vec![0; RAM]);
    page_tables(&mut ram);
    data(&mut ram);
    code(&mut ram);
    tasks(&mut ram);
    modules(&mut ram);
    runtime_code(&mut ram);
    let types = btf::section();
    let ends = [
        ("__stop_BTF", BTF + types.len()),
        ("__start_orc_unwind_ip", ORC),
        ("__stop_orc_unwind_ip", ORC + 4 * ENTRIES.len()),
        ("__start_orc_unwind", ORC + 0x1000),
        ("__stop_orc_unwind", ORC + 0x1000 + 6 * ENTRIES.len()),
    ];
    ram.put(IMAGE + BTF, &types);
    orc(&mut ram, IMAGE + ORC, IMAGE, &ENTRIES);
    let mut all: Vec<(&str, u64)> = PERCPU_SYMBOLS.to_vec();
    all.extend(SYMBOLS.iter().map(|(name, at)| (*name, BASE + at)));
    all.extend(ends.iter().map(|(name, at)| (*name, BASE + *at as u64)));
    ram.put(IMAGE + KALLSYMS, &symbols::tables(BASE, &all, BASE + FILL));
    ram.0
}

/// The physical address at which the second of [`two_kernels`] has its memory.
pub const SECOND: usize = RAM;
/// The release of the second of [`two_kernels`].
pub const SECOND_RELEASE: &str = "6.13.0-made-up";

/// Memory with two kernels: the second one at the same virtual addresses and other physical ones,
/// as after a kexec that leaves the first one in memory.
pub fn two_kernels() -> Vec<u8> {
    let mut ram = Builder(build());
    let mut second = Builder(build());
    let tables = IMAGE + TABLES;
    for at in (tables..tables + 0x5000)
        .step_by(8)
        .chain([IMAGE + PHYS_BASE])
    {
        let word = u64::from_le_bytes(second.0[at..at + 8].try_into().expect("eight bytes"));
        if word != 0 {
            second.long(at, word.wrapping_add(SECOND as u64));
        }
    }
    second.put(IMAGE + BANNER + 14, SECOND_RELEASE.as_bytes());
    // The first kernel has halted in `schedule`.
    ram.put(IMAGE + 0x10f, &[0xf4]);
    ram.0.extend(second.0);
    ram.0
}

/// The vCPUs of [`two_kernels`]: the first one is halted with interrupts off in the first kernel,
/// and the second one runs the second kernel, as its CPU 0.
pub fn vcpus_of_two_kernels() -> Vec<VcpuRegs> {
    let mut all = [vcpus(), vcpus()].concat();
    all[1].index = 1;
    all[1].cr3 += SECOND as u64;
    all
}

/// The kernel's page tables: the image and the direct map, each one large page.
fn page_tables(ram: &mut Builder) {
    let at = |n: usize| IMAGE + TABLES + 0x1000 * n;
    let entry = |n: usize| at(n) as u64 | 3;
    ram.long(at(0) + 8 * 511, entry(1));
    ram.long(at(1) + 8 * 510, entry(2));
    ram.long(at(2) + 8 * 8, IMAGE as u64 | 0x83);
    ram.long(at(0) + 8 * 273, entry(3));
    ram.long(at(3), entry(4));
    ram.long(at(4), 0x83);
}

fn data(ram: &mut Builder) {
    let at = |offset: usize| IMAGE + offset;
    ram.long(
        at(0x2_0000),
        (IMAGE as u64).wrapping_sub(BASE - 0xffff_ffff_8000_0000),
    );
    ram.word(at(0x2_0010), 2);
    ram.put(
        at(BANNER),
        b"Linux version 6.12.0-made-up (nobody@nowhere) #1\n\0",
    );
    ram.word(at(NR_THREADS as usize), 3);
    ram.word(at(PANIC_CPU as usize), u32::MAX);
    for cpu in 0..2 {
        let area = PERCPU + 0x4000 * cpu;
        let task = virt(task_at(4 * cpu));
        ram.long(at(0x2_0100) + 8 * cpu, virt(area));
        ram.long(area + 8, task);
        ram.long(area + 16, task);
        ram.long(area + 24, virt(STACKS + STACK * (9 + cpu)) - 8);
        ram.long(area + 32, virt(STACKS + STACK * (12 + 4 * cpu)));
    }
    ram.put(at(0x2_0200), &[3]);
    ram.put(at(0x2_0240), &[1]);
}

/// `klp_update_patch_state`, as far as introspection reads it.
fn code(ram: &mut Builder) {
    let mut code = vec![0xf0, 0x48, 0x0f, 0xba, 0x37, 13, 0x8b, 0x05];
    let next = UPDATE + code.len() as u64 + 4;
    code.extend((0x2_0080 - next as u32).to_le_bytes());
    code.extend([0x89, 0x87, 140, 0, 0, 0, 0xc3]);
    ram.put(IMAGE + UPDATE as usize, &code);
}

/// Writes the two arrays of an ORC table, at `at` and one page later, for code at `text`.
fn orc(ram: &mut Builder, at: usize, text: usize, entries: &[(u64, [u8; 6])]) {
    for (n, (offset, entry)) in entries.iter().enumerate() {
        let distance = (text as u64 + offset).wrapping_sub(at as u64 + 4 * n as u64);
        ram.word(at + 4 * n, distance as u32);
        ram.put(at + 0x1000 + 6 * n, entry);
    }
}

/// `init_task`; a kernel thread that has never run; a process in a system call, with a second
/// thread in a module; an idle task. A kretprobe has replaced a return address of the second thread,
/// and the function graph tracer one of the idle task.
fn tasks(ram: &mut Builder) {
    let stack = |n: usize| match n {
        0 => IMAGE + INIT_STACK as usize,
        n => STACKS + STACK * n,
    };
    for (n, flags) in [0x2, 0x20_0000, 0, 0, 0x2].into_iter().enumerate() {
        let at = task_at(n);
        let process = if n == 3 { 2 } else { n };
        ram.word(at + 16, u32::from(n == 4));
        ram.long(at + 32, virt(stack(n)));
        ram.word(at + 44, flags);
        ram.word(at + 48, u32::from(n == 0));
        ram.word(at + 60, n as u32 % 4);
        ram.word(at + 64, process as u32 % 4);
        ram.word(at + 68, 1);
        ram.long(at + 112, virt(signal_at(process)));
        ram.word(at + 140, u32::MAX);
        ram.put(at + 160, b"made-up");
    }
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        ram.long(task_at(from) + 72, virt(task_at(to) + 72));
    }
    for (n, threads) in [&[0][..], &[1], &[2, 3]].into_iter().enumerate() {
        let mut from = signal_at(n);
        for thread in threads {
            ram.long(from, virt(task_at(*thread) + 88));
            from = task_at(*thread) + 88;
        }
        ram.long(from, virt(signal_at(n)));
    }
    let kthread_entry = BASE + FORK + 2;
    let top = |n: usize| stack(n) + STACK;
    ram.long(top(0) - 0x40, kthread_entry);
    for (n, below, words) in [
        (1, 0x100, &[BASE + FORK][..]),
        (2, 192, &[BASE + 0x110, BASE + SYSCALL + 4]),
        (3, 0x80, &[virt(MODULE_TEXT) + 0x10, BASE + HOOK]),
        (4, 0x80, &[BASE + 0x110, BASE + GRAPH]),
    ] {
        ram.long(task_at(n) + 176, virt(top(n) - below));
        for (i, word) in words.iter().enumerate() {
            ram.long(top(n) - below + 8 + 8 * i, *word);
        }
    }
    ram.long(top(2) - 168 + 0x88, 0x33);
    ram.long(task_at(3) + 192, virt(RETHOOK + 16));
    ram.long(RETHOOK + 32, kthread_entry);
    ram.long(RETHOOK + 40, virt(top(3) - 0x80 + 16));
    ram.long(task_at(4) + 200, virt(RET_STACK));
    ram.word(task_at(4) + 208, 4);
    ram.long(RET_STACK, kthread_entry);
    ram.long(RET_STACK + 16, virt(top(4) - 0x80 + 16));
    ram.long(RET_STACK + 24, 1 << 12 | 1 << 10 | 3);
}

fn modules(ram: &mut Builder) {
    let links = [
        MODULES_HEAD,
        module_at(0) + 8,
        module_at(1) + 8,
        MODULES_HEAD,
    ];
    for pair in links.windows(2) {
        ram.long(pair[0], virt(pair[1]));
    }
    for n in 0..2 {
        let at = module_at(n);
        let text = MODULE_TEXT + 0x2000 * n;
        let tables = MODULES + 0x4000 + 0x3000 * n;
        ram.put(at + 24, &[b'm', b'0' + n as u8]);
        ram.long(at + 80, virt(text));
        ram.word(at + 88, 0x1000);
        ram.long(at + 192, virt(at + 0x200));
        ram.word(at + 200, 2);
        ram.long(at + 208, virt(tables));
        ram.long(at + 216, virt(tables + 0x1000));
        orc(ram, tables, text, &[(0, CALL), (0x800, CALL)]);
        // struct mod_kallsyms, its symbols and their names.
        ram.long(at + 0x200, virt(at + 0x300));
        ram.word(at + 0x208, 2);
        ram.long(at + 0x210, virt(at + 0x400));
        ram.put(at + 0x318, &[1, 0, 0, 0, 0x12, 0, 1, 0]);
        ram.long(at + 0x320, virt(text) + 0x10);
        ram.long(at + 0x218, virt(at + 0x380));
        ram.put(at + 0x380, b"?t");
        ram.put(at + 0x400, b"\0work\0");
        // It exports the symbol.
        ram.long(at + 224, virt(at + 0x480));
        ram.word(at + 232, 1);
        ram.word(at + 0x480, (text + 0x10 - (at + 0x480)) as u32);
        ram.word(at + 0x484, (0x401u32).wrapping_sub(0x484));
    }
}

fn runtime_code(ram: &mut Builder) {
    let lists = IMAGE + LISTS as usize;
    // The head, the first entry's link, and the address of the word with the code's address.
    for (head, link, code) in [
        (lists, RUNTIME_CODE, RUNTIME_CODE + 16),
        (lists + 0x10, RUNTIME_CODE + 0x408, RUNTIME_CODE + 0x400),
        (lists + 0x20, RUNTIME_CODE + 0x800, RUNTIME_CODE + 0x810),
    ] {
        ram.long(head, virt(link));
        ram.long(link, virt(head));
        ram.long(code, virt(MODULE_TEXT + 0x1800));
    }
    ram.long(lists + 0x40, virt(lists + 0x40));
    for cache in [lists + 0x20, lists + 0x40] {
        ram.long(cache + 0x10, virt(RUNTIME_CODE + 0xc00));
    }
    ram.put(RUNTIME_CODE + 0x418, b"bpf_prog\0");
    ram.put(RUNTIME_CODE + 0xc00, b"kprobe_insn_page\0");
    ram.word(lists + 0x70, 1);
}

/// The one online vCPU: it runs `init_task`, in `schedule`.
pub fn vcpus() -> Vec<VcpuRegs> {
    let mut regs = VcpuRegs::default();
    regs.cr0 = CR0_PG;
    regs.efer = EFER_LMA;
    regs.cr3 = (IMAGE + TABLES) as u64;
    regs.rip = BASE + 0x110;
    regs.rsp = BASE + INIT_STACK + STACK as u64 - 0x40;
    regs.gs_base = virt(PERCPU);
    regs.lstar = BASE + SYSCALL;
    regs.online = true;
    vec![regs]
}
