//! Live patching of a running Linux guest's kernel, from outside the guest.
//!
//! A *patch* here is an ordinary livepatch module, a `.ko` with a `struct klp_patch`, built for the
//! guest's kernel. The guest does not load it: [`Patcher`] links it against the guest's own
//! symbols, writes it into guest memory, redirects the entries of the functions that it replaces,
//! and switches the guest's tasks to the new functions by the kernel's per-task consistency model
//! (`kernel/livepatch/transition.c`). The guest needs no agent, and no `CONFIG_LIVEPATCH`.
//!
//! # The life of a patch
//! [`Patcher::apply`] parses and links the module while the guest runs. In one short pause it then
//! *starts a transition*: it points the entry of every patched function to a stub that chooses
//! between the previous and the new function by the running task's patch state (in a kernel without
//! `CONFIG_LIVEPATCH`, by a table of the tasks that have not switched), and switches each task
//! whose stack is reliable and shows none of the previous functions (`klp_check_stack_func`). If
//! that is every task, as is usual, the transition completes in this pause. Otherwise further tasks
//! switch over time: by the guest's own code on their way to user mode (with `CONFIG_LIVEPATCH`),
//! or by their stacks in later pauses, in which [`Patcher::poll`] *tries to complete* the
//! transition (`klp_try_complete_transition`). When the last task has switched, the entries jump
//! straight to the new functions and the patch is [`Applied`](PatchPhase::Applied).
//!
//! [`Patcher::revert`] switches tasks back in the same way, after which the memory of the patch is
//! freed. A running transition can be *reversed* ([`Patcher::cancel`]; `klp_reverse_transition`) or
//! *forced* ([`Patcher::force`]; `klp_force_transition`), after which the code of the patch is
//! never freed. Tasks that block it can be sent the kernel's *fake signal* ([`Patcher::signal`];
//! `klp_send_signals`). There is one transition at a time. [`Patcher::status`] reports every patch
//! and, for every task, how it switched or what blocks it; [`Patcher::check`] is a dry run.
//!
//! The writes of one pause are made whole or not at all: if one fails, those before it are undone
//! before the guest runs.
//!
//! # The guest
//! The guest is reached through two traits. [`introspect::PhysMemory`] reads its memory and cannot
//! write. [`Machine`] stops and resumes its vCPUs, reads their registers, writes its memory, adds
//! hidden memory and sends interrupts: every effect on the guest passes through it, and the VMM
//! implements it. [`ReadOnlyMachine`] makes one of a core file, for queries and dry runs.
//!
//! This crate knows Linux and x86-64. It must not know KVM, how a guest is started, or how its
//! callers are reached.
//!
//! # Example
//! Apply a patch, and wait until every task has switched:
//!
//! ```no_run
//! use std::thread::sleep;
//! use std::time::Instant;
//!
//! use patcher::{Machine, Mode, PatchError, Patcher};
//!
//! fn apply<M: Machine>(machine: &mut M, module: &[u8]) -> Result<(), PatchError> {
//!     let mut patcher = Patcher::new();
//!     let name = patcher.apply(machine, module, Mode::PerTask)?;
//!     while let Some(due) = patcher.due() {
//!         // The guest runs until the next step is due.
//!         sleep(due.saturating_duration_since(Instant::now()));
//!         patcher.poll(machine)?;
//!     }
//!     for patch in patcher.status().iter().filter(|patch| patch.name == name) {
//!         let (tasks, pauses) = (patch.tasks.len(), &patch.pauses);
//!         println!("{name}: {:?}, {tasks} tasks", patch.phase);
//!         println!("longest of {} pauses: {} us", pauses.count, pauses.longest_us);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Errors
//! Every call that fails returns a [`PatchError`], whose message says what was found and what to
//! do, and whose [`source`](std::error::Error::source) leads to the cause. [`PatchError::kind`]
//! sorts errors for programs: whether to try again, to wait, or to give up. After an error the
//! guest runs as before the call; only after [`PatchError::Undo`] it must be stopped.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests cast numbers that they made themselves"
    )
)]

mod call;
mod error;
mod ftrace;
mod guest;
mod guest_array;
mod livepatch;
mod machine;
mod memory;
mod module;
mod patcher;
mod registration;
mod report;
mod transition;
mod x86;

pub use error::{ErrorKind, GuestError, PatchError};
pub use ftrace::ops::FtraceOpsError;
pub use ftrace::site::SiteError;
pub use machine::read_only::ReadOnlyMachine;
pub use machine::{Machine, MachineError};
pub use memory::error::PatchMemoryError;
pub use module::{LinkError, ModuleError, TargetError};
pub use patcher::{KernelInUse, Patcher};
pub use report::check::{AllocationReport, CheckReport, FoundFunction, FoundSymbol};
pub use report::patch::{FunctionReport, Mode, PatchPhase, PatchStatus};
pub use report::pause::{PAUSE_BOUNDS_US, PauseLength, PauseReport};
pub use report::reading::Reading;
pub use report::stack::{NamedFrame, TaskStack};
pub use report::task::{SwitchedBy, TaskReport};
pub use x86::EncodeError;
