//! Whether a guest that is busy can ever go on: if not, it is read as it is.
//!
//! The evidence is in the guest's memory and registers. A guest that is merely slow, as its host is
//! overloaded, must not be taken for one that has ended, so what is not certain at once is watched
//! over all attempts. This module knows what shows that a kernel has ended; it must not know what
//! is read of it.

use introspect::kernel::is_halted_permanently;
use introspect::{Kernel, KernelMemory, VcpuRegs};

/// `include/linux/panic.h: PANIC_CPU_INVALID`.
const PANIC_CPU_INVALID: u32 = u32::MAX;
/// `include/linux/panic.h: TAINT_DIE`: the kernel has had an oops.
const TAINT_DIE: u64 = 1 << 7;

/// What a busy guest showed in the pauses of one query so far.
#[derive(Debug, Default)]
pub struct EndOfLife {
    /// The guest never runs again: it is in a core file.
    never_runs: bool,
    /// What the first pause found.
    first: Option<Observed>,
    /// A later pause found that tasks had started or ended.
    counts_changed: bool,
    /// A pause found a vCPU that was not halted permanently, or had run since the first one.
    runs: bool,
}

/// What does not change in a guest in which nothing happens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Observed {
    vcpus: Vec<VcpuRegs>,
    /// `total_forks` and `nr_threads`, which change in the sections that hold `tasklist_lock` for
    /// writing.
    counts: Option<(u64, u32)>,
}

impl EndOfLife {
    /// Nothing is known yet. `never_runs`: the guest is in a core file.
    #[must_use]
    pub fn new(never_runs: bool) -> EndOfLife {
        EndOfLife {
            never_runs,
            ..EndOfLife::default()
        }
    }

    /// Why the guest cannot go on, given what one more pause found in which it was busy; `None` if
    /// it may. `is_last`: there will be no other pause.
    pub fn reason(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
        vcpus: &[VcpuRegs],
        is_last: bool,
    ) -> Option<&'static str> {
        if self.never_runs {
            return Some("the guest is in a core file");
        }
        if has_panicked(kernel, memory) {
            return Some("the guest's kernel has panicked");
        }
        let observed = Observed {
            vcpus: vcpus.to_vec(),
            counts: counts(kernel, memory),
        };
        let mut online = vcpus.iter().filter(|vcpu| vcpu.online).peekable();
        self.runs |= online.peek().is_none()
            || !online.all(|vcpu| is_halted_permanently(memory.phys(), vcpu));
        let first = self.first.get_or_insert_with(|| observed.clone());
        self.runs |= first.vcpus != observed.vcpus;
        self.counts_changed |= first.counts != observed.counts || observed.counts.is_none();
        if !is_last {
            return None;
        }
        if !self.runs {
            return Some("all vCPUs are halted with interrupts off");
        }
        if self.counts_changed {
            return None;
        }
        (tainted(kernel, memory) & TAINT_DIE != 0)
            .then_some("the guest's kernel had an oops, and then stood still")
    }
}

/// Whether the kernel is in `kernel/panic.c: panic`, from which it does not return: the other CPUs
/// are stopped, whatever they hold.
#[must_use]
pub fn has_panicked(kernel: &Kernel, memory: &KernelMemory<'_>) -> bool {
    let panic_cpu = kernel.symbols.address("panic_cpu").ok();
    let cpu = panic_cpu.and_then(|at| memory.u32(at).ok());
    cpu.is_some_and(|cpu| cpu != PANIC_CPU_INVALID)
}

fn tainted(kernel: &Kernel, memory: &KernelMemory<'_>) -> u64 {
    let mask = kernel.symbols.address("tainted_mask").ok();
    mask.and_then(|at| memory.u64(at).ok()).unwrap_or_default()
}

fn counts(kernel: &Kernel, memory: &KernelMemory<'_>) -> Option<(u64, u32)> {
    let symbol = |name| kernel.symbols.address(name).ok();
    let total_forks = memory.u64(symbol("total_forks")?).ok()?;
    Some((total_forks, memory.u32(symbol("nr_threads")?).ok()?))
}
