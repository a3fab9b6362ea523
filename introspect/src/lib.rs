//! Read-only knowledge of a Linux guest's kernel, from its memory and vCPU registers alone.
//!
//! No KVM, no writes, no symbol file: the same calls work on a live guest and on a dump. What the guest is asked through is
//! [`PhysMemory`], which cannot write, and [`VcpuRegs`]; a [`CoreFile`] (an ELF core, or a raw image to which the
//! registers are given) has both, and so has whoever stops a guest's vCPUs.
//!
//! # Example
//! Every stack in a core file:
//!
//! ```no_run
#![doc = include_str!("../examples/stacks.rs")]
//! ```
//!
//! # What is read, under which lock, and what can be wrong
//! Stop every vCPU, read, and let them run: only what a paused guest shows is of one moment. A pause can come in the middle of a
//! change, though, and no lock can be waited for from outside. Where a reader depends on a lock of the guest's, it looks whether that
//! lock is held, and says *busy* if so; the caller lets the guest run for a moment and asks again. Whoever only needs RCU in the guest needs
//! nothing here: an entry is whole before it is linked, and a stopped vCPU frees nothing.
//!
//! | reader | depends on | what it can say wrong | cost |
//! | --- | --- | --- | --- |
//! | [`CoreFile::open`], [`CoreFile::raw`] | nothing | nothing: they refuse what is not whole | linear in segments and vCPUs |
//! | [`Kernel::find`] | nothing: what it keeps is fixed once the guest runs | of a guest that is still booting, nothing: [`NotReady`] | linear in the kernel's image and types: hundreds of ms |
//! | [`task_list::read`] | `tasklist_lock`, else [`TasksError::Busy`] | a name that is being changed (`comm` is written in pieces); state, flags and patch state are those of the pause, under no lock in the guest either | linear in tasks |
//! | [`modules::list`] | RCU only | nothing; a module that is being formed or freed is left out, as the guest leaves it out | linear in modules |
//! | [`modules::Module::symbols`] | RCU only | nothing for a module of the same pause; for one of an earlier pause, anything | n log n in its symbols |
//! | [`listing::modules_and_runtime`] | RCU only | nothing, but that `ftrace_mod_maps` is left out | n log n in all symbols of modules |
//! | [`Unwinder::new`] | nothing: the tables are fixed | nothing: it proves them on known functions | linear in them |
//! | [`Unwinder::refresh`] | RCU only | nothing; what it cannot read makes stacks unreliable | linear in modules, and in the tables of new ones |
//! | [`Unwinder::stack`] | nothing: a task that no vCPU runs and that is on no CPU does not touch its stack | frames of an [`Unreliable`](Verdict::Unreliable) stack; of a reliable one, nothing | linear in frames, each a binary search |
//! | [`PerCpu::online`] | nothing: one bit each | nothing | linear in possible CPUs |
//! | [`layout::LockWord::is_held`] | nothing: one word | nothing | constant |
//!
//! Which locks whoever *changes* a guest must find free, and that it looks, is the `patcher` crate's business.
//!
//! # A hostile guest
//! Everything read is hostile input: every pointer, count, length and list. Each reader bounds what it reads and keeps, finds cycles, and
//! answers with an error or, of a stack, with a verdict; none panics. A hostile guest can tell lies about itself, and no others.
//!
//! # What is promised
//! What is named here and re-exported below keeps its names and meanings within a minor version; error types and [`Unreliable`] may get
//! more variants. The other modules are public for the other crates of outpatch.

#![deny(missing_docs)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests cast numbers that they made themselves"
    )
)]

mod addr;
pub mod btf;
pub mod core_dump;
pub mod kernel;
pub mod memory;
pub mod modules;
mod parallel;
pub mod symbols;
pub mod task;
pub mod task_list;
#[cfg(test)]
mod testing;
pub mod unwind;
mod vcpu;
pub mod x86;

pub use addr::{Gva, GvaRange};
pub use btf::{Btf, BtfError};
pub use core_dump::{CoreError, CoreFile, RawRange};
pub use kernel::klp::KlpState;
pub use kernel::layout::Layout;
pub use kernel::percpu::{PerCpu, PerCpuKind};
pub use kernel::tif::ThreadFlags;
pub use kernel::{FindError, Kernel, NotReady, TextRanges};
pub use memory::kernel::{Field, KernelMemory, ReadCause, ReadError};
pub use memory::paging::{AddressSpace, Mapping, Unmapped};
pub use memory::{OutOfBounds, PhysMemory};
pub use modules::proc_kallsyms::KallsymsEntry;
pub use symbols::{Symbol, SymbolError, Symbols};
pub use task::{PatchState, Task, TaskKind};
pub use task_list::TasksError;
pub use unwind::stack::{Frame, Stack, Unreliable, Verdict};
pub use unwind::{Unwinder, UnwinderError};
pub use vcpu::VcpuRegs;
