//! Where the fields lie that introspection reads, resolved once from the guest's own BTF.
//!
//! This module knows names of types and members, never numbers. A field that a generation lacks is
//! an `Option`; the error for any other names what is missing. A field that only one other module
//! needs is resolved there.

use crate::addr::Gva;
use crate::btf::{Btf, BtfError};
use crate::memory::kernel::{Field, KernelMemory, ReadError};

/// Every field, by the structure that it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layout {
    /// Fields of `struct task_struct`, and of the structures inside it.
    pub task: TaskLayout,
    /// Fields of `struct signal_struct`, which the threads of a process share.
    pub signal: SignalLayout,
    /// Fields of `struct module`.
    pub module: ModuleLayout,
    /// `list_head.next`.
    pub list_next: Field,
    /// The words that say whether a lock is held.
    pub lock: LockLayout,
}

/// Fields of `struct task_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskLayout {
    /// `thread_info.flags`: the TIF bits.
    pub thread_flags: Field,
    /// `thread_info.cpu`, or `cpu`: the CPU that the task runs on or last ran on.
    pub cpu: Field,
    /// `__state` (`state`, 8 bytes, before 5.14): why the task does not run; 0 if it can.
    pub state: Field,
    /// `exit_state`: how far the task's exit is; 0 before it.
    pub exit_state: Field,
    /// `stack`: the lowest address of the task's kernel stack.
    pub stack: Field,
    /// `stack_refcount`: references to the kernel stack; 0 once it is freed.
    pub stack_refcount: Field,
    /// `flags`: the PF bits.
    pub flags: Field,
    /// `on_cpu`, 4 bytes or 1: whether a CPU runs the task.
    pub on_cpu: Field,
    /// `tasks`: the link in the list of processes.
    pub tasks: Field,
    /// `thread_node`: the link in the list of the process's threads.
    pub thread_node: Field,
    /// `pid`: the thread id.
    pub pid: Field,
    /// `tgid`: the process id.
    pub tgid: Field,
    /// `comm`: the name, 16 bytes.
    pub comm: Field,
    /// `signal`: the pointer to the process's `signal_struct`.
    pub signal: Field,
    /// `nvcsw`: the count of voluntary context switches.
    pub nvcsw: Field,
    /// `nivcsw`: the count of involuntary context switches.
    pub nivcsw: Field,
    /// `stack_canary`: a random number.
    pub stack_canary: Option<Field>,
    /// `start_time`: the time at which the task was created, in nanoseconds since boot.
    pub start_time: Option<Field>,
    /// `thread.sp`: the saved stack pointer.
    pub sp: Field,
    /// `patch_state`: the livepatch state; with `CONFIG_LIVEPATCH` only.
    pub patch_state: Option<Field>,
}

/// Fields of `struct signal_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SignalLayout {
    /// `thread_head`: the head of the list of the process's threads.
    pub thread_head: Field,
}

/// Fields of `struct module`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModuleLayout {
    /// `state`: an `enum module_state`.
    pub state: Field,
    /// `list`: the link in the list of modules.
    pub list: Field,
    /// `name`: the name, an array of bytes.
    pub name: Field,
    /// The fields that say where the module's code lies.
    pub memory: ModuleMemoryLayout,
    /// `kallsyms`: the pointer to the module's `struct mod_kallsyms`.
    pub kallsyms: Option<Field>,
    /// Fields of `struct mod_kallsyms`; with `CONFIG_KALLSYMS` only.
    pub symbols: Option<ModuleSymbolsLayout>,
    /// Fields of `arch` that lead to the module's unwind data; with the ORC unwinder only.
    pub orc: Option<ModuleOrcLayout>,
}

/// The fields that say where a module's code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleMemoryLayout {
    /// `core_layout` and `init_layout` (up to 6.3).
    Layouts {
        /// `base` and `text_size` of `core_layout`.
        core: Extent,
        /// `base` and `text_size` of `init_layout`.
        init: Extent,
    },
    /// `mem[]`, with an element for each type of memory (6.4 on).
    Memories {
        /// `base` and `size` of `mem[MOD_TEXT]`.
        core: Extent,
        /// `base` and `size` of `mem[MOD_INIT_TEXT]`.
        init: Extent,
    },
}

/// Two fields that describe a range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The address at which it begins.
    pub base: Field,
    /// Its length in bytes.
    pub size: Field,
}

/// Fields of `struct mod_kallsyms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModuleSymbolsLayout {
    /// `symtab`: the pointer to the ELF symbols.
    pub symtab: Field,
    /// `num_symtab`: the number of symbols.
    pub count: Field,
    /// `strtab`: the pointer to the names.
    pub strtab: Field,
    /// `typetab`: the pointer to the letters, one byte a symbol.
    pub types: Field,
    /// The fields that lead to the symbols that the module exports.
    pub exports: ExportsLayout,
}

/// The fields that lead to the symbols that a module exports to all modules (`EXPORT_SYMBOL`), and
/// from 7.x on to all symbols that it exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportsLayout {
    /// `module.syms`: the pointer to an array of `struct kernel_symbol`.
    pub symbols: Field,
    /// `module.num_syms`: the number of its elements.
    pub count: Field,
    /// The size of a `struct kernel_symbol` in bytes.
    pub size: u64,
    /// `kernel_symbol.value_offset`: the distance from this field to the symbol.
    pub value: Field,
    /// `kernel_symbol.name_offset`: the distance from this field to the name.
    pub name: Field,
}

/// Fields of `struct mod_arch_specific` that lead to unwind data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModuleOrcLayout {
    /// `num_orcs`: the number of ORC entries.
    pub count: Field,
    /// `orc_unwind_ip`: the pointer to their addresses.
    pub ips: Field,
    /// `orc_unwind`: the pointer to the entries.
    pub entries: Field,
}

/// The words that say whether a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockLayout {
    /// A `struct mutex`: it is held, or is being handed over.
    pub mutex: LockWord,
    /// An `rwlock_t`: it is held for writing.
    pub rwlock_writer: LockWord,
}

/// How a type of lock shows that it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockWord {
    /// The field that shows it.
    pub field: Field,
    /// At least one of these bits is set in the field while the lock is held.
    pub held: u64,
}

impl LockWord {
    /// Whether the lock at `lock` is held. Reads one word.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    pub fn is_held(&self, memory: &KernelMemory<'_>, lock: Gva) -> Result<bool, ReadError> {
        Ok(memory.field(lock, self.field)? & self.held != 0)
    }
}

impl Layout {
    /// Resolves every field from BTF.
    ///
    /// # Errors
    /// [`BtfError`], with the first type or member that is missing.
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

/// The result of `resolve` where `has` is true.
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

/// With `CONFIG_PREEMPT_RT` a mutex is an `rt_mutex`, and an `rwlock_t` that is held for writing
/// shows it by a bit of the count of readers (`include/linux/rwbase_rt.h: WRITER_BIAS`; up to 5.14
/// in the rt patches' `kernel/locking/rwlock-rt.c`).
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
    let extent = |kind: &str| {
        let index = btf.enum_value(kind)?.cast_unsigned();
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
