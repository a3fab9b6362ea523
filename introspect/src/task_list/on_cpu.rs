//! Which task each vCPU runs.
//!
//! The GS base of a vCPU says which CPU it is, and that CPU's `current_task` says which task it
//! runs. Both are accepted only if the stack pointer agrees: in the middle of a context switch it
//! is on another task's stack. A vCPU whose task is not certain is left out; that task then counts
//! as running with registers that are not known. A vCPU that is halted permanently in another
//! kernel runs no task of this one.

use std::collections::HashMap;

use crate::addr::{Gva, GvaRange};
use crate::kernel::{Kernel, StackAreas};
use crate::memory::kernel::KernelMemory;
use crate::vcpu::VcpuRegs;

/// A vCPU and the task that it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunningTask {
    /// Index of the vCPU in the VMM.
    pub(crate) vcpu: u32,
    /// The guest's number of this CPU.
    pub(crate) cpu: u32,
    /// The `task_struct` of the task that it runs.
    pub(crate) task: Gva,
}

/// Assigns tasks to vCPUs, where it is certain which task a vCPU runs.
pub(crate) fn assign(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    areas: &StackAreas,
    vcpus: &[VcpuRegs],
    parked: &[u32],
) -> Vec<RunningTask> {
    let found: Vec<RunningTask> = vcpus
        .iter()
        .filter(|vcpu| vcpu.online && !vcpu.foreign && !parked.contains(&vcpu.index))
        .filter_map(|vcpu| task_of(kernel, memory, areas, vcpu))
        .collect();
    only_unique(found)
}

/// The task of one vCPU; `None` unless exactly one of the CPUs that it may be fits.
fn task_of(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    areas: &StackAreas,
    vcpu: &VcpuRegs,
) -> Option<RunningTask> {
    let mut fitting = candidates(kernel, vcpu).into_iter().filter_map(|cpu| {
        let task = kernel.current_task(memory, cpu).ok()?;
        let stack = memory.pointer(kernel.layout.task.stack.of(task)).ok()?;
        fits(memory, areas, vcpu, cpu, stack).then_some(RunningTask {
            vcpu: vcpu.index,
            cpu,
            task,
        })
    });
    let found = fitting.next()?;
    fitting.next().is_none().then_some(found)
}

/// The CPUs that a vCPU may be. In user mode the GS base is set by the user program; in the kernel
/// it is the kernel's, except in a few instructions of kernel entry and exit.
fn candidates(kernel: &Kernel, vcpu: &VcpuRegs) -> Vec<u32> {
    let of_kernel_gs = kernel.percpu.cpu_of_gs(vcpu.kernel_gs_base);
    if vcpu.cpl != 0 {
        return of_kernel_gs.into_iter().collect();
    }
    let of_gs = kernel.percpu.cpu_of_gs(vcpu.gs_base);
    let mut both: Vec<u32> = of_gs.into_iter().chain(of_kernel_gs).collect();
    both.dedup();
    both
}

/// Whether a vCPU's stack pointer allows that it is `cpu` and runs the task whose stack begins at
/// `stack`.
fn fits(
    memory: &KernelMemory<'_>,
    areas: &StackAreas,
    vcpu: &VcpuRegs,
    cpu: u32,
    stack: Gva,
) -> bool {
    let sp = Gva(vcpu.rsp);
    // For a few instructions of system call entry and exit the stack pointer is the user's.
    let is_user_address = sp.0 >> 63 == 0;
    let on = |range: GvaRange| range.contains(sp) || range.end == sp;
    vcpu.cpl != 0
        || is_user_address
        || on(areas.task(stack).range)
        || areas.of_cpu(memory, cpu).iter().any(|area| on(area.range))
}

/// Drops every vCPU that shares its CPU or its task with another one: no two can, so neither is
/// accepted.
fn only_unique(found: Vec<RunningTask>) -> Vec<RunningTask> {
    let mut cpus: HashMap<u32, usize> = HashMap::new();
    let mut tasks: HashMap<Gva, usize> = HashMap::new();
    for on in &found {
        *cpus.entry(on.cpu).or_default() += 1;
        *tasks.entry(on.task).or_default() += 1;
    }
    found
        .into_iter()
        .filter(|on| cpus.get(&on.cpu) == Some(&1) && tasks.get(&on.task) == Some(&1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_claims_on_one_cpu_or_task_are_both_dropped() {
        let on = |vcpu, cpu, task| RunningTask {
            vcpu,
            cpu,
            task: Gva(task),
        };
        let honest = on(0, 0, 0x1000);
        assert_eq!(only_unique(vec![honest, on(1, 1, 0x2000)]).len(), 2);
        assert_eq!(
            only_unique(vec![honest, on(1, 1, 0x2000), on(2, 1, 0x3000)]),
            [honest]
        );
        assert_eq!(only_unique(vec![honest, on(1, 1, 0x1000)]), []);
    }
}
