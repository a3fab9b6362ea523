//! What is measured: the calls that the VMM makes, on the memory of a guest that stands still.
//!
//! Memory comes in the two ways that users have it: mapped, as the VMM has its guest's, and read from a core file, as the
//! command line's `--core` does.

use anyhow::{Context, Result, ensure};
use introspect::{CoreFile, Kernel, PhysMemory, Stack, Task, Unwinder, VcpuRegs, task_list};
use tests::core_machine;
use vm_memory::GuestMemoryMmap;

use tests::sleeper_cores::Core;

/// A guest, from its core.
pub struct Subject {
    /// How many sleepers it has.
    pub sleepers: u32,
    /// Its core file.
    pub core: CoreFile,
    /// Its memory, as the VMM maps it.
    pub mapped: GuestMemoryMmap,
}

impl Subject {
    /// Opens a core and copies the guest's memory out of it.
    ///
    /// # Errors
    /// When the core is not one.
    pub fn load(core: &Core) -> Result<Subject> {
        let sleepers = core.sleepers;
        let path = &core.path;
        let core = CoreFile::open(path).with_context(|| path.display().to_string())?;
        let mapped = core_machine::map(&core)?;
        Ok(Subject {
            sleepers,
            core,
            mapped,
        })
    }

    /// Both sorts of memory, with what to call each.
    pub fn memories(&self) -> [(&'static str, &dyn PhysMemory); 2] {
        [("mapped", &self.mapped), ("core file", &self.core)]
    }

    /// The registers of its vCPUs.
    pub fn vcpus(&self) -> &[VcpuRegs] {
        self.core.vcpus()
    }
}

/// First contact: base, symbols, types, offsets.
///
/// # Errors
/// When there is no kernel.
pub fn first_contact(memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Kernel> {
    Ok(Kernel::find(memory, vcpus)?)
}

/// The unwind data of the kernel and of its modules.
///
/// # Errors
/// When they cannot be had.
pub fn unwind_data(kernel: &Kernel, memory: &dyn PhysMemory) -> Result<Unwinder> {
    let memory = kernel.memory(memory);
    let mut unwinder = Unwinder::new(kernel, &memory)?;
    unwinder.refresh(kernel, &memory)?;
    Ok(unwinder)
}

/// All tasks, as in one pause.
///
/// # Errors
/// When the lists are broken.
pub fn list(kernel: &Kernel, memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Vec<Task>> {
    Ok(task_list::read(kernel, &kernel.memory(memory), vcpus)?)
}

/// All tasks with their stacks, as in one pause.
///
/// # Errors
/// When the lists are broken.
pub fn stacks(
    kernel: &Kernel,
    unwinder: &Unwinder,
    memory: &dyn PhysMemory,
    vcpus: &[VcpuRegs],
) -> Result<Vec<(Task, Stack)>> {
    let memory = kernel.memory(memory);
    let tasks = task_list::read(kernel, &memory, vcpus)?;
    let each: Vec<&Task> = tasks.iter().collect();
    let stacks = unwinder.stacks(&memory, &each, vcpus);
    Ok(tasks.into_iter().zip(stacks).collect())
}

/// That every sleeper is there, and that all of its stack is known: what is fast and wrong is worth nothing.
///
/// # Errors
/// When one is missing, or its stack is not reliable.
pub fn check(all: &[(Task, Stack)], sleepers: u32) -> Result<()> {
    // Of ten, one waits for a process and one for a thread (guests/programs/sleeper.c), all named for how they sleep.
    let expected = usize::try_from(sleepers / 10 * 12)?;
    let asleep = all
        .iter()
        .filter(|(task, _)| task.comm.starts_with("sleep-"));
    let mut found = 0;
    for (task, stack) in asleep {
        let Task { pid, comm, .. } = task;
        ensure!(task.state_letter() == 'S', "{comm} ({pid}) does not sleep");
        ensure!(stack.is_reliable(), "{comm} ({pid}): {}", stack.verdict);
        // A system call, what it waits in, and the scheduler.
        let frames = stack.frames.len();
        ensure!(frames >= 4, "{comm} ({pid}) has {frames} frames");
        found += 1;
    }
    ensure!(found == expected, "{found} sleepers and not {expected}");
    Ok(())
}

/// That walking them over several threads gave what walking each by itself gives.
///
/// # Errors
/// When one is another.
pub fn check_each(
    kernel: &Kernel,
    unwinder: &Unwinder,
    memory: &dyn PhysMemory,
    (vcpus, all): (&[VcpuRegs], &[(Task, Stack)]),
) -> Result<()> {
    let memory = kernel.memory(memory);
    for (task, stack) in all {
        let runs = |vcpu: &&VcpuRegs| task.vcpu == Some(vcpu.index);
        let alone = unwinder.stack(&memory, task, vcpus.iter().find(runs));
        ensure!(
            alone == *stack,
            "{} ({}): {alone:?}, among all {stack:?}",
            task.comm,
            task.pid
        );
    }
    Ok(())
}
