//! [`Unwinder`]: the kernel stack of any task of a guest, with a verdict on whether it is complete.
//!
//! This module combines the other files of this folder. An unwinder is made once for a guest
//! ([`Unwinder::new`]), learns of modules in each pause ([`Unwinder::refresh`]) and of code that
//! the caller places in the guest ([`Unwinder::add_region`]), and returns stacks while the guest is
//! paused ([`Unwinder::stack`]). It must not know how patches work.
//!
//! This module follows `kernel/livepatch/transition.c: klp_check_stack` and
//! `arch/x86/kernel/stacktrace.c: arch_stack_walk_reliable`; where those refuse running tasks, the
//! registers of the stopped vCPUs are used.

mod change_log;
mod code_map;
mod module_code;
pub(crate) mod orc;
pub(crate) mod orc_table;
mod ret_addrs;
mod special_code;
pub(crate) mod stack;
pub(crate) mod stack_memory;
mod step;
mod walk;

use crate::addr::{Gva, GvaRange};
use crate::btf::BtfError;
use crate::kernel::Kernel;
use crate::kernel::{StackAreaError, StackAreas};
use crate::memory::kernel::{Field, KernelMemory, ReadError};
use crate::modules::ModulesError;
use crate::parallel;
use crate::symbols::{SymbolError, Symbols};
use crate::task::{Task, TaskKind};
use crate::unwind::code_map::{CodeClass, CodeMap, CoreText};
use crate::unwind::module_code::ModuleRegions;
use crate::unwind::orc::ENTRY_SIZE;
use crate::unwind::orc_table::MAX_ENTRIES;
use crate::unwind::ret_addrs::{RetAddrs, TracerRecords};
use crate::unwind::special_code::{NEW_TASK_ENTRIES, ORDINARY_FUNCTIONS, special_ranges};
use crate::unwind::stack_memory::WalkMemory;
use crate::unwind::step::{Cursor, StackMemory};
use crate::unwind::walk::{Origin, empty, unreliable, walk_stack};
use crate::vcpu::VcpuRegs;

pub use crate::unwind::code_map::{CodeRegion, RegionId, RegionOverlap};
pub use crate::unwind::orc::{OrcBase, OrcEncoding, OrcEntry, OrcKind, RawOrcEntry};
pub use crate::unwind::orc_table::{OrcTable, OrcTableError};
pub use crate::unwind::stack::{Frame, Stack, Unreliable, Verdict};

/// Why the stacks of a guest cannot be walked at all.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnwinderError {
    /// A symbol is missing: a kernel without `CONFIG_UNWINDER_ORC` has no tables.
    #[error("no unwind data in the guest's kernel: {0}")]
    Symbol(#[from] SymbolError),
    /// A type or a member is missing from the kernel's BTF.
    #[error("cannot read stacks: {0}")]
    Type(#[from] BtfError),
    /// The ORC tables could not be read.
    #[error("cannot read the kernel's unwind data: {0}")]
    Read(#[from] ReadError),
    /// The ORC tables are malformed.
    #[error("the kernel's unwind data is malformed: {0}")]
    Table(#[from] OrcTableError),
    /// The locations of the kernel's stacks could not be determined.
    #[error(transparent)]
    StackAreas(#[from] StackAreaError),
    /// The tables contradict what is known of this function, which every kernel has.
    #[error(
        "the kernel's unwind data contradicts its function {0}: the encoding is not understood"
    )]
    Unverified(&'static str),
}

/// How many stacks take longer to walk than a thread takes to start.
const MIN_STACKS_PER_THREAD: usize = 512;

/// Walks the kernel stacks of one guest's tasks.
#[derive(Clone, Debug)]
pub struct Unwinder {
    code: CodeMap,
    modules: ModuleRegions,
    areas: StackAreas,
    inactive_frame: InactiveFrame,
    stack_refcount: Field,
    /// The boot CPU's idle task, which came through init text.
    init_task: Gva,
    /// Functions at which tasks that have never run start.
    new_task_entries: Vec<Gva>,
    tracer_records: TracerRecords,
    sched_text: [GvaRange; 2],
}

/// What `__switch_to_asm` leaves on the stack of a task that is not running (`struct
/// inactive_task_frame`).
#[derive(Clone, Copy, Debug)]
struct InactiveFrame {
    bp: Field,
    ret_addr: Field,
    size: u64,
}

impl Unwinder {
    /// Copies the core kernel's unwind data and verifies, on well-known functions, that it is
    /// understood.
    ///
    /// Needs no lock: the data does not change once the guest runs. Linear in the number of
    /// entries, some hundred thousand.
    ///
    /// # Errors
    /// [`UnwinderError`]: what is missing, or not as expected.
    pub fn new(kernel: &Kernel, memory: &KernelMemory<'_>) -> Result<Unwinder, UnwinderError> {
        let symbols = &kernel.symbols;
        let special = special_ranges(symbols, kernel.text.core);
        let orc = core_table(symbols, memory)?;
        verify(&orc, symbols, &special)?;
        let btf = &kernel.btf;
        let inactive_frame = InactiveFrame {
            bp: btf.field("inactive_task_frame.bp")?,
            ret_addr: btf.field("inactive_task_frame.ret_addr")?,
            size: btf.size_of("inactive_task_frame")?,
        };
        Ok(Unwinder {
            code: CodeMap::new(CoreText {
                text: kernel.text.core,
                init: kernel.text.init,
                orc,
                special,
            }),
            modules: ModuleRegions::default(),
            areas: kernel.stack_areas()?.clone(),
            inactive_frame,
            stack_refcount: kernel.layout.task.stack_refcount,
            init_task: symbols.address("init_task")?,
            new_task_entries: new_task_entries(symbols),
            tracer_records: TracerRecords::new(kernel),
            sched_text: [
                symbols
                    .between("__sched_text_start", "__sched_text_end")
                    .unwrap_or_default(),
                symbols
                    .between("__lock_text_start", "__lock_text_end")
                    .unwrap_or_default(),
            ],
        })
    }

    /// Adds modules that were loaded and removes those that were unloaded since the last call.
    ///
    /// Call it in each pause before asking for stacks: a stack with code of an unknown module is
    /// unreliable, and so is one with code of a module that was unloaded. Needs no lock, as
    /// [`modules`](crate::modules) explains. Linear in the number of modules, and in the unwind
    /// data of new ones.
    ///
    /// # Errors
    /// [`ModulesError`] when the list of modules cannot be read. Stacks that contain no module code
    /// remain reliable.
    pub fn refresh(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<(), ModulesError> {
        let result = self.modules.refresh(&mut self.code, kernel, memory);
        if result.is_err() {
            // Modules may have been loaded and unloaded unnoticed.
            self.code.mark_all_changed();
        }
        result
    }

    /// A number that differs after every change of the known code: a stack that was walked before
    /// may be walked differently now.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.code.generation()
    }

    /// The code whose unwind data changed since [`generation`](Self::generation) returned this
    /// number; `None` if that may be any code. A reliable stack without any of this code would be
    /// walked in the same way again.
    #[must_use]
    pub fn changed_since(&self, generation: u64) -> Option<Vec<GvaRange>> {
        self.code.changed_since(generation)
    }

    /// Adds code that the guest's kernel does not know, with unwind data for it.
    ///
    /// # Errors
    /// [`RegionOverlap`] when another region covers some of this code.
    pub fn add_region(&mut self, region: CodeRegion) -> Result<RegionId, RegionOverlap> {
        self.code.add(region)
    }

    /// Removes what [`Unwinder::add_region`] added.
    pub fn remove_region(&mut self, id: RegionId) {
        self.code.remove(id);
    }

    /// Makes every stack with code of `range` on it unreliable: trampolines, stubs, and other code
    /// during which the stack is not what it seems.
    pub fn add_transient(&mut self, range: GvaRange) {
        self.code.add_transient(range);
    }

    /// Undoes one call of [`Unwinder::add_transient`] with the same `range`.
    pub fn remove_transient(&mut self, range: GvaRange) {
        self.code.remove_transient(range);
    }

    /// The name of the module or the added region whose code an address is in.
    #[must_use]
    pub fn region_name(&self, ip: Gva) -> Option<&str> {
        let (_, region) = self.code.region(ip)?;
        Some(&region.name)
    }

    /// The encoding of this kernel's unwind data; modules built for the kernel have the same.
    #[must_use]
    pub fn encoding(&self) -> OrcEncoding {
        self.code.core_orc().encoding()
    }

    /// Whether `/proc/PID/stack` omits frames at this address (`kernel/sched/core.c:
    /// in_sched_functions`).
    #[must_use]
    pub fn is_sched_text(&self, ip: Gva) -> bool {
        self.sched_text.iter().any(|range| range.contains(ip))
    }

    /// The kernel stack of `task`, which was read in this pause. `regs` are the registers of the
    /// vCPU that runs it, if one does.
    ///
    /// The stack is empty and reliable if the task is in user mode, or is dead and its stack was
    /// freed.
    ///
    /// Needs no lock: only the code that runs on a stack writes to it. A task that is marked as on
    /// a CPU while no vCPU runs it is just being switched to or from; its stack is unreliable. A
    /// reliable stack has every frame, and each is correct; any other stack has the frames up to
    /// the one at which the walk was given up. Linear in the number of frames, which is limited.
    #[must_use]
    pub fn stack(&self, memory: &KernelMemory<'_>, task: &Task, regs: Option<&VcpuRegs>) -> Stack {
        match (regs, task.vcpu) {
            (Some(regs), _) if regs.foreign => unreliable(Unreliable::ForeignVcpu),
            (Some(regs), Some(vcpu)) if regs.index == vcpu => self.running(memory, task, regs),
            (None, None) => self.without_vcpu(memory, task, false),
            _ => unreliable(Unreliable::Running),
        }
    }

    /// As [`stack`](Self::stack), for a task that no vCPU runs, while the guest runs. The result
    /// holds only if the task has not run since it was read.
    pub(crate) fn prewalk(&self, memory: &KernelMemory<'_>, task: &Task) -> Stack {
        self.without_vcpu(memory, task, true)
    }

    /// The kernel stacks of all `tasks`, in their order: each as [`stack`](Self::stack) returns it,
    /// with the registers of that one of the `vcpus` that runs the task. Many stacks are walked by
    /// several threads. The guest must be paused.
    #[must_use]
    pub fn stacks(
        &self,
        memory: &KernelMemory<'_>,
        tasks: &[&Task],
        vcpus: &[VcpuRegs],
    ) -> Vec<Stack> {
        let (phys, space) = (memory.phys(), memory.space());
        parallel::map(tasks, MIN_STACKS_PER_THREAD, |tasks| {
            // Each thread caches its own address translations.
            let memory = KernelMemory::new(phys, space);
            let of = |task: &&Task| {
                let runs = |vcpu: &&VcpuRegs| task.vcpu == Some(vcpu.index);
                self.stack(&memory, task, vcpus.iter().find(runs))
            };
            tasks.iter().map(of).collect()
        })
    }

    fn without_vcpu(&self, memory: &KernelMemory<'_>, task: &Task, guest_runs: bool) -> Stack {
        match task.on_cpu {
            _ if self.is_stackless(memory, task) => empty(),
            false => self.sleeping(memory, task, guest_runs),
            true => unreliable(Unreliable::Running),
        }
    }

    fn running(&self, memory: &KernelMemory<'_>, task: &Task, regs: &VcpuRegs) -> Stack {
        if regs.cpl != 0 {
            return empty();
        }
        let mut areas = vec![self.areas.task(task.stack)];
        if let Some(cpu) = task.cpu {
            areas.extend(self.areas.of_cpu(memory, cpu));
        }
        let origin = Origin {
            through_init: task.addr == self.init_task,
            running: true,
        };
        let mut stacks = WalkMemory::new(memory, &areas);
        let ret_addrs = RetAddrs::new(&self.tracer_records, memory, task.addr, false);
        let start = Cursor::from_vcpu(regs);
        walk_stack(&self.code, &mut stacks, ret_addrs, start, origin)
    }

    fn sleeping(&self, memory: &KernelMemory<'_>, task: &Task, guest_runs: bool) -> Stack {
        let areas = [self.areas.task(task.stack)];
        let mut stacks = WalkMemory::new(memory, &areas);
        match self.saved_cursor(&mut stacks, task.sp) {
            Err(reason) => unreliable(reason),
            Ok(start) => {
                let origin = Origin {
                    through_init: task.addr == self.init_task,
                    running: false,
                };
                let ret_addrs = RetAddrs::new(&self.tracer_records, memory, task.addr, guest_runs);
                walk_stack(&self.code, &mut stacks, ret_addrs, start, origin)
            }
        }
    }

    /// Follows `unwind_orc.c: __unwind_start` for a task that is not running.
    fn saved_cursor(
        &self,
        stacks: &mut WalkMemory<'_, KernelMemory<'_>>,
        sp: Gva,
    ) -> Result<Cursor, Unreliable> {
        let bp = stacks.word(self.inactive_frame.bp.of(sp))?;
        let ip = Gva(stacks.word(self.inactive_frame.ret_addr.of(sp))?);
        Ok(Cursor {
            ip,
            sp: sp.add(self.inactive_frame.size),
            bp,
            exact: self.new_task_entries.contains(&ip),
            retp: None,
            regs: None,
        })
    }

    /// Whether the task is dead and its stack was freed, which happens before its `task_struct` is
    /// freed (`put_task_stack`).
    fn is_stackless(&self, memory: &KernelMemory<'_>, task: &Task) -> bool {
        !task.on_cpu
            && task.kind != TaskKind::Idle
            && task.exit_state != 0
            && (task.stack.is_null() || memory.field(task.addr, self.stack_refcount) == Ok(0))
    }
}

fn new_task_entries(symbols: &Symbols) -> Vec<Gva> {
    // From 6.5 on `ret_from_fork` is a C function that the assembly calls: no task starts there.
    NEW_TASK_ENTRIES
        .iter()
        .find_map(|name| symbols.address(name).ok())
        .into_iter()
        .collect()
}

/// Copies the table between `__start_orc_unwind*` and `__stop_orc_unwind*`, which is sorted at
/// build time (`scripts/sorttable.c`).
fn core_table(symbols: &Symbols, memory: &KernelMemory<'_>) -> Result<OrcTable, UnwinderError> {
    let section = |start, end| -> Result<(Gva, Vec<u8>), UnwinderError> {
        let range = symbols.between(start, end)?;
        let bytes = memory.bytes(range.start, range.len(), MAX_ENTRIES * ENTRY_SIZE)?;
        Ok((range.start, bytes))
    };
    let (ips_at, ips) = section("__start_orc_unwind_ip", "__stop_orc_unwind_ip")?;
    let (_, entries) = section("__start_orc_unwind", "__stop_orc_unwind")?;
    let raw: &[RawOrcEntry] = entries.as_chunks().0;
    let encoding = orc::detect(raw).ok_or(OrcTableError::UnknownEncoding)?;
    Ok(OrcTable::from_sections(ips_at, &ips, &entries, encoding)?)
}

/// Verifies the table against what is known of code that every kernel has.
fn verify(
    orc: &OrcTable,
    symbols: &Symbols,
    special: &[(GvaRange, CodeClass)],
) -> Result<(), UnwinderError> {
    let mut verified = 0;
    for name in ORDINARY_FUNCTIONS {
        let Ok(at) = symbols.address(name) else {
            continue;
        };
        if !orc
            .lookup(at)
            .is_some_and(|entry| entry.is_function_entry())
        {
            return Err(UnwinderError::Unverified(name));
        }
        verified += 1;
    }
    let is_end = |at: Gva| {
        orc.lookup(at)
            .is_some_and(|entry| entry.kind == OrcKind::End)
    };
    let kthread_entry_ends = special
        .iter()
        .any(|(range, class)| *class == CodeClass::TaskEntry && is_end(range.start));
    match (verified, kthread_entry_ends) {
        (4.., true) => Ok(()),
        (4.., false) => Err(UnwinderError::Unverified("ret_from_fork")),
        _ => Err(UnwinderError::Unverified("schedule")),
    }
}
