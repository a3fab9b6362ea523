//! Read-only introspection of a Linux guest's kernel, from its memory and vCPU registers alone.
//!
//! The crate finds the kernel in a guest's memory, and reads its symbols, types, modules, tasks and
//! kernel stacks. It needs no symbol file and no agent in the guest, and it never writes. The same
//! calls work on a live guest and on a core file. Guests are x86-64 kernels with `CONFIG_KALLSYMS`,
//! BTF and ORC unwind data, as distributions build them.
//!
//! # Input
//! Two things are needed of a guest, and nothing here knows KVM or a VMM:
//!
//! - [`PhysMemory`]: its guest-physical memory, which can only be read. Every
//!   [`vm_memory::GuestMemory`] implements it.
//! - [`VcpuRegs`]: the registers of each vCPU when it was stopped, as plain data.
//!
//! A [`CoreFile`] (an ELF core, or a raw image plus registers) provides both, and so does a VMM
//! that stops its vCPUs.
//!
//! # Example: a core file
//! Print every kernel stack in a core file (`examples/stacks.rs`):
//!
//! ```no_run
#![doc = include_str!("../examples/stacks.rs")]
//! ```
//!
//! # Example: a live guest
//! Read tasks and stacks while the guest runs, then revalidate them in a short pause
//! (`examples/live.rs`):
//!
//! ```no_run
#![doc = include_str!("../examples/live.rs")]
//! ```
//!
//! # What is read, under which lock, and what can be wrong
//! Stop every vCPU, read, and resume: only what is read in one pause is of one moment. A pause can
//! come in the middle of a change, though, and no lock can be waited for from outside. Where a
//! reader depends on a lock in the guest, it checks whether that lock is held, and if so returns a
//! *busy* error; the caller then resumes the guest for a moment and retries. What the guest itself
//! reads under RCU alone needs no lock here: an entry is complete before it is linked, and a
//! stopped vCPU frees nothing.
//!
//! | reader | depends on | what it can get wrong | cost |
//! | --- | --- | --- | --- |
//! | [`CoreFile::open`], [`CoreFile::raw`] | nothing | nothing: a file that is not complete is refused | linear in segments and vCPUs |
//! | [`Kernel::find`] | nothing: what it keeps does not change once the guest runs | nothing: a guest that is still booting is refused with [`NotReady`] | linear in the kernel's image and types: tens of ms in a release build |
//! | [`task_list::read`] | `tasklist_lock`, otherwise [`TasksError::Busy`] | a name that is being changed (`comm` is written in pieces); state, flags and patch state are those of the pause, and no lock protects them in the guest either | linear in tasks |
//! | [`TaskCache::refresh`] | as [`task_list::read`] | as [`task_list::read`] | a comparison for each unchanged task |
//! | [`TaskCache::read_in_mid_change`] | nothing | which tasks there are, for the reasons that it returns; otherwise as [`task_list::read`] | linear in tasks |
//! | [`modules::list`] | RCU only | nothing; a module that is being formed or freed is omitted, as the guest omits it | linear in modules |
//! | [`modules::Module::symbols`] | RCU only | nothing for a module of the same pause; anything for one of an earlier pause | n log n in its symbols |
//! | [`modules_and_runtime`] | RCU only | nothing, except that `ftrace_mod_maps` is omitted | n log n in all symbols of modules |
//! | [`Unwinder::new`] | nothing: the tables do not change | nothing: they are verified on known functions | linear in them |
//! | [`Unwinder::refresh`] | RCU only | nothing; what it cannot read makes stacks unreliable | linear in modules, and in the tables of new ones |
//! | [`Unwinder::stack`] | nothing: a task that no vCPU runs and that is on no CPU does not change its stack | frames of an [`Unreliable`] stack; nothing of a reliable one | linear in frames, each a binary search |
//! | [`PerCpu::online`] | nothing: one bit for each CPU | nothing | linear in possible CPUs |
//! | [`LockWord::is_held`] | nothing: one word | nothing | constant |
//!
//! Which locks must be free before a guest may be *changed*, and checking them, is the `patcher`
//! crate's responsibility.
//!
//! # Hostile guests
//! Everything that is read is hostile input: every pointer, count, length and list. Each reader
//! bounds what it reads and keeps, detects cycles, and returns an error or, for a stack, a verdict;
//! none panics. A hostile guest can give false information about itself, and about nothing else.
//!
//! # Stability
//! The items of this crate keep their names and meanings within a minor version. Error types,
//! [`Unreliable`] and [`VcpuRegs`] may grow: they are `#[non_exhaustive]`. Items hidden from this
//! documentation may change at any time.

#![deny(missing_docs)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests cast numbers that they made themselves"
    )
)]

mod parallel;
#[cfg(test)]
mod testing;

// What introspection reads: guest-physical memory and vCPU registers, live or from a file.
pub mod memory;
#[doc(inline)]
pub use memory::{AddressSpace, FieldRange, Mapping, OutOfBounds, PhysMemory, Unmapped};
#[doc(inline)]
pub use memory::{Field, KernelMemory, ReadCause, ReadError};

mod addr;
pub use addr::{Gva, GvaRange};

mod vcpu;
pub use vcpu::VcpuRegs;

pub mod core_dump;
#[doc(inline)]
pub use core_dump::{CoreError, CoreFile, RawRange};

pub mod x86;

// What it finds in a guest.
pub mod kernel;
#[doc(inline)]
pub use kernel::KlpState;
#[doc(inline)]
pub use kernel::ThreadFlags;
#[doc(inline)]
pub use kernel::{FindError, Kernel, NotReady, TextRanges};
#[doc(inline)]
pub use kernel::{Layout, LockWord};
#[doc(inline)]
pub use kernel::{PerCpu, PerCpuKind};

pub mod symbols;
#[doc(inline)]
pub use symbols::kallsyms::KallsymsError;
#[doc(inline)]
pub use symbols::{Symbol, SymbolError, Symbols};

pub mod btf;
#[doc(inline)]
pub use btf::{Btf, BtfError};

pub mod modules;
#[doc(inline)]
pub use modules::ModuleSymbols;
#[doc(inline)]
pub use modules::{KallsymsEntry, ListingError, modules_and_runtime};
#[doc(inline)]
pub use modules::{Module, ModulesError};

pub mod task;
#[doc(inline)]
pub use task::{PatchState, Task, TaskKind};

pub mod task_list;
#[doc(inline)]
pub use task_list::TasksError;
#[doc(inline)]
pub use task_list::{CachedTask, TaskCache};

pub mod unwind;
#[doc(inline)]
pub use unwind::{CodeRegion, OrcTable, OrcTableError, RegionId, RegionOverlap};
#[doc(inline)]
pub use unwind::{Frame, Stack, Unreliable, Unwinder, UnwinderError, Verdict};

/// Parsers that fuzz targets and tests of this crate call directly.
///
/// They are public only because fuzz targets and integration tests are crates of their own.
#[doc(hidden)]
pub mod internals {
    /// Parsing kallsyms tables.
    pub mod kallsyms {
        pub use crate::symbols::kallsyms::{ImagePart, KallsymsError, digits, parse};
    }

    /// Detecting how ORC tables are encoded, and how long they may be.
    pub mod orc {
        pub use crate::unwind::orc::detect;
        pub use crate::unwind::orc_table::MAX_ENTRIES;
    }
}
