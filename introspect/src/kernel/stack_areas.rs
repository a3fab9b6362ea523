//! Where a kernel's stacks lie: those of tasks, and those of each CPU.
//!
//! This module knows sizes and per-CPU pointers, resolved once from BTF and kallsyms; it must not
//! know what is on the stacks. It follows `arch/x86/kernel/dumpstack_64.c` and
//! `arch/x86/include/asm/{cpu_entry_area,processor}.h`.

use crate::addr::{Gva, GvaRange};
use crate::btf::{Btf, BtfError};
use crate::kernel::percpu::PerCpu;
use crate::memory::kernel::{Field, KernelMemory};
use crate::symbols::{SymbolError, Symbols};
use crate::x86::PAGE_SIZE;

/// The exception stacks of a CPU, by their members in `struct cea_exception_stacks`. Some kernels
/// lack some of them.
const EXCEPTION_STACKS: &[&str] = &[
    "cea_exception_stacks.DF_stack",
    "cea_exception_stacks.NMI_stack",
    "cea_exception_stacks.DB_stack",
    "cea_exception_stacks.MCE_stack",
    "cea_exception_stacks.VC_stack",
    "cea_exception_stacks.VC2_stack",
];

/// Why the stacks of a kernel cannot be located.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StackAreaError {
    /// A symbol is missing.
    #[error("cannot find the kernel's stacks: {0}")]
    Symbol(#[from] SymbolError),
    /// A type or a member is missing.
    #[error("cannot find the kernel's stacks: {0}")]
    Type(#[from] BtfError),
    /// A stack has a size that no stack has.
    #[error("{what} has {size:#x} bytes, which is not a possible stack size")]
    Size {
        /// Which of the stacks.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
    },
}

/// The kernel's `enum stack_type`: what a stack is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackType {
    /// The kernel stack of a task.
    Task,
    /// A CPU's interrupt stack.
    Irq,
    /// One of a CPU's exception stacks (IST, or FRED's levels).
    Exception,
    /// A CPU's entry trampoline stack.
    Entry,
}

impl StackType {
    /// Whether the code that was interrupted to get here may be on another stack. Kernel entries
    /// from user mode arrive on task and entry stacks, so no other stack follows those.
    pub(crate) fn interrupts(self) -> bool {
        matches!(self, StackType::Irq | StackType::Exception)
    }
}

/// One stack, as the kernel's `struct stack_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackArea {
    /// The type of the stack.
    pub kind: StackType,
    /// Its addresses.
    pub range: GvaRange,
}

/// The most bytes of a stack (`THREAD_SIZE` with KASAN is 32 KiB).
pub(crate) const MAX_STACK: u64 = 64 << 10;

/// Where the stacks of a kernel lie.
#[derive(Clone, Debug)]
pub struct StackAreas {
    thread_size: u64,
    irq_size: u64,
    exceptions: Vec<Field>,
    /// The exception stacks and the entry stack within `struct cpu_entry_area`.
    estacks: Field,
    entry: Field,
    cpus: Vec<CpuPointers>,
}

/// The addresses of one CPU's pointers to its stacks.
#[derive(Clone, Copy, Debug)]
struct CpuPointers {
    cpu: u32,
    /// `hardirq_stack_ptr`: the end of the interrupt stack, or the last word in it.
    irq: Gva,
    /// `cea_exception_stacks`: its exception stacks in its `struct cpu_entry_area`.
    estacks: Gva,
}

impl StackAreas {
    /// Resolves them from the kernel's symbols and types.
    ///
    /// # Errors
    /// [`StackAreaError`] for the first thing that is missing.
    pub(crate) fn resolve(
        symbols: &Symbols,
        btf: &Btf,
        percpu: &PerCpu,
    ) -> Result<StackAreas, StackAreaError> {
        let irq = irq_pointer(symbols, btf)?;
        let estacks = symbols.address("cea_exception_stacks")?;
        let cpus = percpu
            .cpus()
            .iter()
            .filter_map(|cpu| {
                Some(CpuPointers {
                    cpu: *cpu,
                    irq: percpu.address(irq, *cpu)?,
                    estacks: percpu.address(estacks, *cpu)?,
                })
            })
            .collect();
        Ok(StackAreas {
            thread_size: checked("a task's stack", thread_size(symbols)?)?,
            irq_size: checked("an interrupt stack", btf.size_of("irq_stack")?)?,
            exceptions: EXCEPTION_STACKS
                .iter()
                .filter_map(|path| btf.field(path).ok())
                .collect(),
            estacks: btf.field("cpu_entry_area.estacks")?,
            entry: btf.field("cpu_entry_area.entry_stack_page")?,
            cpus,
        })
    }

    /// The stack of the task whose lowest address is `stack`.
    #[must_use]
    pub fn task(&self, stack: Gva) -> StackArea {
        StackArea {
            kind: StackType::Task,
            range: GvaRange::new(stack, stack.add(self.thread_size)),
        }
    }

    /// The stacks besides the task's that code on `cpu` may be on, as far as they can be read.
    #[must_use]
    pub fn of_cpu(&self, memory: &KernelMemory<'_>, cpu: u32) -> Vec<StackArea> {
        let Some(pointers) = self.cpus.iter().find(|pointers| pointers.cpu == cpu) else {
            return Vec::new();
        };
        let mut areas = Vec::with_capacity(self.exceptions.len() + 2);
        if let Ok(pointer) = memory.pointer(pointers.irq)
            && let Some(top) = pointer.0.checked_next_multiple_of(PAGE_SIZE)
        {
            areas.push(StackArea {
                kind: StackType::Irq,
                range: GvaRange::new(Gva(top).sub(self.irq_size), Gva(top)),
            });
        }
        if let Ok(estacks) = memory.pointer(pointers.estacks) {
            areas.extend(self.exceptions.iter().map(|field| StackArea {
                kind: StackType::Exception,
                range: field_range(estacks, *field),
            }));
            areas.push(StackArea {
                kind: StackType::Entry,
                range: field_range(self.estacks.container(estacks), self.entry),
            });
        }
        areas
    }
}

fn field_range(base: Gva, field: Field) -> GvaRange {
    let start = field.of(base);
    GvaRange::new(start, start.add(field.size))
}

fn checked(what: &'static str, size: u64) -> Result<u64, StackAreaError> {
    if (PAGE_SIZE..=MAX_STACK).contains(&size) && size.is_power_of_two() {
        Ok(size)
    } else {
        Err(StackAreaError::Size { what, size })
    }
}

/// `THREAD_SIZE`. No type in BTF has it; the boot CPU's idle task has a stack of that size between
/// two symbols (`include/asm-generic/vmlinux.lds.h: INIT_TASK_DATA`, renamed in 6.10).
fn thread_size(symbols: &Symbols) -> Result<u64, StackAreaError> {
    let stack = symbols
        .between("__start_init_stack", "__end_init_stack")
        .or_else(|_| symbols.between("__start_init_task", "__end_init_task"))?;
    Ok(stack.len())
}

/// The per-CPU variable `hardirq_stack_ptr`, or the member of that name in `pcpu_hot` (6.2 to
/// 6.14).
fn irq_pointer(symbols: &Symbols, btf: &Btf) -> Result<Gva, StackAreaError> {
    match symbols.address("hardirq_stack_ptr") {
        Ok(variable) => Ok(variable),
        Err(missing) => {
            let hot = symbols.address("pcpu_hot").map_err(|_| missing)?;
            Ok(btf.field("pcpu_hot.hardirq_stack_ptr")?.of(hot))
        }
    }
}
