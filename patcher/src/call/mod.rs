//! Calls in the guest: code of outpatch that a CPU of the guest runs, started by the guest's own
//! `irq_work`.
//!
//! [`irq_work`] queues a function for interrupt context; [`wake`] is its first user. Calls in
//! process context, of the guest's functions or of a patch's, and the values that they return
//! belong in a file `workqueue.rs` beside them, on top of `irq_work`.

pub mod irq_work;
pub mod wake;
