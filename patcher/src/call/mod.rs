//! Calls in the guest: code of outpatch that a CPU of the guest runs, started by the guest's own
//! `irq_work`.
//!
//! [`irq_work`] queues a function for interrupt context; [`wake`] is its first user. Calls in
//! process context, through the guest's workqueues, belong in a file `workqueue.rs` beside them.

pub mod irq_work;
pub mod wake;
