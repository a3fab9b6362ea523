//! Which task each vCPU runs.
//!
//! A vCPU's CPU is told by its GS base, its task by that CPU's `current_task`, and both are believed only if the stack pointer
//! agrees: in the middle of a context switch it is another task's. What is not certain is left out; the task then counts as
//! running with no registers of its own.

use std::collections::HashMap;

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::kernel::stack_areas::StackAreas;
use crate::memory::kernel::KernelMemory;
use crate::vcpu::VcpuRegs;

/// One vCPU and what it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningTask {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// The CPU that it is to the guest.
    pub cpu: u32,
    /// The task that it runs.
    pub task: Gva,
}

/// The vCPUs of which it is certain what they run.
pub(crate) fn attribute(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    places: &StackAreas,
    vcpus: &[VcpuRegs],
) -> Vec<RunningTask> {
    let found: Vec<RunningTask> = vcpus
        .iter()
        .filter(|vcpu| vcpu.online && !vcpu.foreign)
        .filter_map(|vcpu| one(kernel, memory, places, vcpu))
        .collect();
    only_unique(found)
}

fn one(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    places: &StackAreas,
    vcpu: &VcpuRegs,
) -> Option<RunningTask> {
    let mut fitting = candidates(kernel, vcpu).into_iter().filter_map(|cpu| {
        let task = kernel.current_task(memory, cpu).ok()?;
        let stack = memory.pointer(kernel.layout.task.stack.of(task)).ok()?;
        fits(memory, places, vcpu, cpu, stack).then_some(RunningTask {
            vcpu: vcpu.index,
            cpu,
            task,
        })
    });
    let found = fitting.next()?;
    fitting.next().is_none().then_some(found)
}

/// In user mode GS is the user's own, to be set at will; in the kernel it is the kernel's but for a few instructions of entry
/// and exit.
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

fn fits(
    memory: &KernelMemory<'_>,
    places: &StackAreas,
    vcpu: &VcpuRegs,
    cpu: u32,
    stack: Gva,
) -> bool {
    let sp = Gva(vcpu.rsp);
    // System call entry and exit run on the user's stack pointer for a few instructions.
    let is_user_address = sp.0 >> 63 == 0;
    let on = |range: crate::GvaRange| range.contains(sp) || range.end == sp;
    vcpu.cpl != 0
        || is_user_address
        || on(places.task(stack).range)
        || places.of_cpu(memory, cpu).iter().any(|span| on(span.range))
}

/// No two vCPUs are the same CPU or run the same task: where it seems so, neither is believed.
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
