//! Code of ours that the guest runs: started by its own `irq_work`, on a CPU of its own.

pub mod irq_work;
pub mod wake;
