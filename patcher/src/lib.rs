//! What a livepatch is, where it goes in a guest, and the transition of the guest's tasks to it.
//!
//! Reads the guest through `introspect`, changes it through the narrow [`Machine`] trait, and knows nothing of KVM.

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
mod report;
mod transition;
mod x86;

pub use error::{ErrorKind, PatchError};
pub use machine::read_only::ReadOnlyMachine;
pub use machine::{Machine, MachineError};
pub use patcher::Patcher;
pub use report::check::{CheckReport, FoundFunction, FoundSymbol, PieceReport};
pub use report::patch::{FunctionReport, Mode, PatchPhase, PatchStatus};
pub use report::pause::{PAUSE_BOUNDS_US, PauseLength, PauseReport};
pub use report::stack::{NamedFrame, TaskStack};
pub use report::task::{SwitchedBy, TaskReport};
