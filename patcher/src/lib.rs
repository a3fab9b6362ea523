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

mod apply;
mod cave;
mod check;
pub mod error;
mod facts;
mod func_stack;
mod guest;
mod journal;
mod ledger;
mod look;
pub mod machine;
pub mod module;
mod naming;
mod patch;
pub mod patcher;
mod pause;
mod place;
mod quiet;
mod redirect;
mod room;
mod scene;
mod signal;
mod site;
pub mod status;
mod still;
#[cfg(test)]
mod testing;
mod tracers;
mod transition;
mod unmoved;
pub mod view;
mod wake;
mod window;

pub use error::{ErrorKind, PatchError};
pub use machine::{Machine, MachineError};
pub use patcher::Patcher;
pub use status::{
    CheckReport, FoundFunction, FoundSymbol, FunctionReport, Mode, PAUSE_BOUNDS_US, PatchPhase,
    PatchStatus, PauseLength, PauseReport, PieceReport, TaskReport, TaskWay,
};
pub use still::Still;
pub use view::{NamedFrame, TaskStack};
