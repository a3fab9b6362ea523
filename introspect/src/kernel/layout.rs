//! Where the fields lie that this program reads, resolved once from the guest's own BTF.
//!
//! Knows names of types and members, never numbers. A field that a generation lacks is an `Option`; the error for any other
//! names what is missing. What only one other place needs, that place asks BTF for itself.

use crate::addr::Gva;
use crate::btf::{Btf, BtfError};
use crate::memory::kernel::{Field, KernelMemory, ReadError};

/// Every field, by the structure it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `struct task_struct` and what is inside it.
    pub task: TaskLayout,
    /// `struct signal_struct`.
    pub signal: SignalLayout,
    /// `struct module`.
    pub module: ModuleLayout,
    /// `struct list_head`'s `next`.
    pub list_next: Field,
    /// Locks.
    pub lock: LockLayout,
}

/// `struct task_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskLayout {
    /// `thread_info.flags`: the TIF bits.
    pub thread_flags: Field,
    /// The CPU it last ran on.
    pub cpu: Field,
    /// `__state`; `state`, 8 bytes, before 5.14.
    pub state: Field,
    /// `exit_state`.
    pub exit_state: Field,
    /// `stack`: the lowest address of its stack.
    pub stack: Field,
    /// `stack_refcount`.
    pub stack_refcount: Field,
    /// `flags`: the PF bits.
    pub flags: Field,
    /// `on_cpu`: 4 bytes, or 1.
    pub on_cpu: Field,
    /// `tasks`: the list of processes.
    pub tasks: Field,
    /// `thread_node`: the list of a process's threads.
    pub thread_node: Field,
    /// `pid`.
    pub pid: Field,
    /// `tgid`.
    pub tgid: Field,
    /// `comm`.
    pub comm: Field,
    /// `signal`.
    pub signal: Field,
    /// `nvcsw`: voluntary context switches.
    pub nvcsw: Field,
    /// `nivcsw`: involuntary ones.
    pub nivcsw: Field,
    /// `stack_canary`: a random number.
    pub stack_canary: Option<Field>,
    /// `start_time`: when it was made.
    pub start_time: Option<Field>,
    /// `thread.sp`: the saved stack pointer.
    pub sp: Field,
    /// `patch_state`.
    pub patch_state: Option<Field>,
}

/// `struct signal_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalLayout {
    /// `thread_head`: the process's threads.
    pub thread_head: Field,
}

/// `struct module`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleLayout {
    /// `state`.
    pub state: Field,
    /// `list`.
    pub list: Field,
    /// `name`.
    pub name: Field,
    /// Where its memory is described.
    pub memory: ModuleMemoryLayout,
    /// `kallsyms`: pointer to its symbols.
    pub kallsyms: Option<Field>,
    /// `struct mod_kallsyms`.
    pub symbols: Option<ModuleSymbolsLayout>,
    /// `arch`'s unwind data.
    pub orc: Option<ModuleOrcLayout>,
}

/// How a module says where its text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleMemoryLayout {
    /// `core_layout` and `init_layout` (up to 6.3).
    Layouts {
        /// `core_layout`'s `base` and `text_size`.
        core: Extent,
        /// `init_layout`'s.
        init: Extent,
    },
    /// `mem[]`, one for each sort of memory (6.4 on).
    Memories {
        /// `mem[MOD_TEXT]`'s `base` and `size`.
        core: Extent,
        /// `mem[MOD_INIT_TEXT]`'s.
        init: Extent,
    },
}

/// A piece of memory that two fields describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub base: Field,
    /// How many bytes.
    pub size: Field,
}

/// `struct mod_kallsyms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleSymbolsLayout {
    /// `symtab`: ELF symbols.
    pub symtab: Field,
    /// `num_symtab`.
    pub count: Field,
    /// `strtab`.
    pub strtab: Field,
    /// `typetab`: the letter of each.
    pub types: Field,
    /// What the module exports.
    pub exports: ExportsLayout,
}

/// Where a module says what it exports to all (`EXPORT_SYMBOL`; from 7.x on, to whomever).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportsLayout {
    /// `module.syms`.
    pub symbols: Field,
    /// `module.num_syms`.
    pub count: Field,
    /// Bytes of a `struct kernel_symbol`.
    pub size: u64,
    /// `kernel_symbol.value_offset`.
    pub value: Field,
    /// `kernel_symbol.name_offset`.
    pub name: Field,
}

/// `struct mod_arch_specific`: unwind data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleOrcLayout {
    /// `num_orcs`.
    pub count: Field,
    /// `orc_unwind_ip`.
    pub ips: Field,
    /// `orc_unwind`.
    pub entries: Field,
}

/// Locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockLayout {
    /// A `struct mutex`: somebody has it, or is being given it.
    pub mutex: LockWord,
    /// An `rwlock_t`: a writer has it.
    pub rwlock_writer: LockWord,
}

/// How a sort of lock says that it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockWord {
    /// Its field that does.
    pub field: Field,
    /// One of these bits is set in it while the lock is held.
    pub held: u64,
}

impl LockWord {
    /// Whether the lock at `lock` is held. Constant.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    pub fn is_held(&self, memory: &KernelMemory<'_>, lock: Gva) -> Result<bool, ReadError> {
        Ok(memory.field(lock, self.field)? & self.held != 0)
    }
}

impl Layout {
    /// Resolves every field.
    ///
    /// # Errors
    /// [`BtfError`], naming the first type or member that is missing.
    pub fn resolve(btf: &Btf) -> Result<Layout, BtfError> {
        Ok(Layout {
            task: task(btf)?,
            signal: SignalLayout {
                thread_head: btf.field("signal_struct.thread_head")?,
            },
            module: module(btf)?,
            list_next: btf.field("list_head.next")?,
            lock: lock(btf)?,
        })
    }
}

/// What `resolve` gives, where the kernel has the thing at all.
fn when<T>(
    has: bool,
    resolve: impl FnOnce() -> Result<T, BtfError>,
) -> Result<Option<T>, BtfError> {
    has.then(resolve).transpose()
}

fn task(btf: &Btf) -> Result<TaskLayout, BtfError> {
    Ok(TaskLayout {
        thread_flags: btf.field("task_struct.thread_info.flags")?,
        cpu: btf.first_field(&["task_struct.thread_info.cpu", "task_struct.cpu"])?,
        state: btf.first_field(&["task_struct.__state", "task_struct.state"])?,
        exit_state: btf.field("task_struct.exit_state")?,
        stack: btf.field("task_struct.stack")?,
        stack_refcount: btf.field("task_struct.stack_refcount")?,
        flags: btf.field("task_struct.flags")?,
        on_cpu: btf.field("task_struct.on_cpu")?,
        tasks: btf.field("task_struct.tasks")?,
        thread_node: btf.field("task_struct.thread_node")?,
        pid: btf.field("task_struct.pid")?,
        tgid: btf.field("task_struct.tgid")?,
        comm: btf.field("task_struct.comm")?,
        signal: btf.field("task_struct.signal")?,
        nvcsw: btf.field("task_struct.nvcsw")?,
        nivcsw: btf.field("task_struct.nivcsw")?,
        stack_canary: btf.field("task_struct.stack_canary").ok(),
        start_time: btf.field("task_struct.start_time").ok(),
        sp: btf.field("task_struct.thread.sp")?,
        patch_state: btf.field("task_struct.patch_state").ok(),
    })
}

/// With `CONFIG_PREEMPT_RT` a mutex is an `rt_mutex`, and a writer of an `rwlock_t` says so by a bit of the count of readers
/// (`include/linux/rwbase_rt.h: WRITER_BIAS`; up to 5.14 in the rt patches' `kernel/locking/rwlock-rt.c`).
fn lock(btf: &Btf) -> Result<LockLayout, BtfError> {
    const ANY: u64 = u64::MAX;
    const WRITER_BIAS: u64 = 1 << 30;
    let word = |held, paths: &[&str]| btf.first_field(paths).map(|field| LockWord { field, held });
    let mutex = word(ANY, &["mutex.owner"]);
    let is_rt = mutex.is_err();
    let rt_mutex = &["mutex.rtmutex.owner", "mutex.lock.owner"];
    let rt_rwlock = &["rwbase_rt.readers.counter", "rt_rw_lock.readers.counter"];
    Ok(LockLayout {
        mutex: mutex.or_else(|_| word(ANY, rt_mutex))?,
        rwlock_writer: match is_rt {
            true => word(WRITER_BIAS, rt_rwlock)?,
            false => word(ANY, &["qrwlock.wlocked"])?,
        },
    })
}

fn module(btf: &Btf) -> Result<ModuleLayout, BtfError> {
    Ok(ModuleLayout {
        state: btf.field("module.state")?,
        list: btf.field("module.list")?,
        name: btf.field("module.name")?,
        memory: module_memory(btf)?,
        kallsyms: btf.field("module.kallsyms").ok(),
        symbols: when(btf.has("mod_kallsyms"), || {
            Ok(ModuleSymbolsLayout {
                symtab: btf.field("mod_kallsyms.symtab")?,
                count: btf.field("mod_kallsyms.num_symtab")?,
                strtab: btf.field("mod_kallsyms.strtab")?,
                types: btf.field("mod_kallsyms.typetab")?,
                exports: ExportsLayout {
                    symbols: btf.field("module.syms")?,
                    count: btf.field("module.num_syms")?,
                    size: btf.size_of("kernel_symbol")?,
                    value: btf.field("kernel_symbol.value_offset")?,
                    name: btf.field("kernel_symbol.name_offset")?,
                },
            })
        })?,
        orc: when(btf.field("module.arch.num_orcs").is_ok(), || {
            Ok(ModuleOrcLayout {
                count: btf.field("module.arch.num_orcs")?,
                ips: btf.field("module.arch.orc_unwind_ip")?,
                entries: btf.field("module.arch.orc_unwind")?,
            })
        })?,
    })
}

fn module_memory(btf: &Btf) -> Result<ModuleMemoryLayout, BtfError> {
    let Ok(memories) = btf.member("module.mem") else {
        let extent = |base: &str, size: &str| {
            Ok::<_, BtfError>(Extent {
                base: btf.field(base)?,
                size: btf.field(size)?,
            })
        };
        return Ok(ModuleMemoryLayout::Layouts {
            core: extent("module.core_layout.base", "module.core_layout.text_size")?,
            init: extent("module.init_layout.base", "module.init_layout.text_size")?,
        });
    };
    let base = btf.field("module_memory.base")?;
    let size = btf.field("module_memory.size")?;
    let extent = |sort: &str| {
        let index = btf.enum_value(sort)?.cast_unsigned();
        let inside = |field: Field| Field {
            offset: memories
                .offset
                .wrapping_add(index.wrapping_mul(memories.element()))
                .wrapping_add(field.offset),
            size: field.size,
        };
        Ok::<_, BtfError>(Extent {
            base: inside(base),
            size: inside(size),
        })
    };
    Ok(ModuleMemoryLayout::Memories {
        core: extent("MOD_TEXT")?,
        init: extent("MOD_INIT_TEXT")?,
    })
}
