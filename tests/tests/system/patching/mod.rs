//! Scenarios of patching a guest: what is patched and reverted, which tasks switch how, what is
//! refused, and what else in the guest uses the same functions.

pub mod apply_revert;
pub mod blocked_tasks;
pub mod dry_run;
pub mod fault_injection;
pub mod generations;
pub mod guest_tools;
pub mod insmod;
pub mod locks;
pub mod modes;
pub mod no_livepatch;
pub mod patch_memory;
pub mod patch_stack;
pub mod refusals;
pub mod registration;
pub mod soak;
pub mod task_kinds;
pub mod traced_sleepers;
pub mod versus_klp;
