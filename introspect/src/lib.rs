//! Read-only knowledge of a Linux guest's kernel, from its memory and vCPU registers alone.
//!
//! No KVM, no writes, no symbol file: the same calls work on a live guest and on a dump. Everything read is hostile input.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests cast numbers that they made themselves"
    )
)]

pub mod addr;
pub mod btf;
mod btf_raw;
pub mod core_error;
pub mod core_file;
pub mod core_notes;
pub mod find;
pub mod kallsyms;
mod kallsyms_image;
pub mod kernel;
pub mod layout;
pub mod listing;
pub mod livepatch;
pub mod memory;
pub mod module_symbols;
pub mod modules;
pub mod orc;
pub mod orc_table;
pub mod paging;
pub mod percpu;
pub mod reader;
pub mod stack;
pub mod stacks;
pub mod stacks_code;
pub mod stacks_cpu;
pub mod stacks_modules;
pub mod stacks_places;
pub mod stacks_rules;
pub mod stacks_walk;
pub mod symbols;
pub mod task;
pub mod tasks;
pub mod tasks_vcpus;
#[cfg(test)]
mod testing;
pub mod tif;
pub mod unwind;
pub mod vcpu;

pub use addr::{Gva, GvaRange};
pub use btf::{Btf, BtfError};
pub use core_error::CoreError;
pub use core_file::CoreFile;
pub use kernel::{FindError, Kernel, NotReady, TextRanges};
pub use layout::Layout;
pub use listing::ListedSymbol;
pub use livepatch::Livepatch;
pub use memory::{PhysMemory, Unbacked};
pub use paging::{AddressSpace, Mapping, Unmapped};
pub use percpu::{PerCpu, PerCpuKind};
pub use reader::{Field, KernelMemory, ReadCause, ReadError};
pub use stack::{Frame, Stack, Unreliable, Verdict};
pub use stacks::{Unwinder, UnwinderError};
pub use symbols::{Symbol, SymbolError, Symbols};
pub use task::{PatchState, Task, TaskKind};
pub use tasks::{TasksError, tasks};
pub use tif::Tif;
pub use vcpu::VcpuRegs;
