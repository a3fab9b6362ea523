//! What is measured: the calls that the VMM makes, on the memory of a paused guest.
//!
//! The memory is read in the two ways that users read it: mapped, as the VMM maps its guest's, and
//! from a core file, as the command line's `--core` does.

use anyhow::{Context, Result, ensure};
use introspect::{CoreFile, Kernel, PhysMemory, Stack, Task, Unwinder, VcpuRegs, task_list};
use tests::core_machine;
use tests::sleeper_cores::Core;
use vm_memory::GuestMemoryMmap;

/// A guest from a core file.
pub struct Subject {
    /// The number of sleepers in the guest.
    pub sleepers: u32,
    /// The core file.
    pub core: CoreFile,
    /// The guest's memory, as the VMM maps it.
    pub mapped: GuestMemoryMmap,
}

impl Subject {
    /// Opens a core file and copies the guest's memory from it.
    ///
    /// # Errors
    /// When the file cannot be read, or is not a core file.
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

    /// Both kinds of memory, with their names.
    pub fn memories(&self) -> [(&'static str, &dyn PhysMemory); 2] {
        [("mapped", &self.mapped), ("core file", &self.core)]
    }

    /// The registers of the guest's vCPUs.
    pub fn vcpus(&self) -> &[VcpuRegs] {
        self.core.vcpus()
    }
}

/// Finds the kernel: its base, symbols, types and offsets.
///
/// # Errors
/// When no kernel is found.
pub fn first_contact(memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Kernel> {
    Ok(Kernel::find(memory, vcpus)?)
}

/// Reads the unwind data of the kernel and of its modules.
///
/// # Errors
/// When they cannot be read.
pub fn unwind_data(kernel: &Kernel, memory: &dyn PhysMemory) -> Result<Unwinder> {
    let memory = kernel.memory(memory);
    let mut unwinder = Unwinder::new(kernel, &memory)?;
    unwinder.refresh(kernel, &memory)?;
    Ok(unwinder)
}

/// Lists all tasks, as in one pause.
///
/// # Errors
/// When the task list is corrupt.
pub fn list(kernel: &Kernel, memory: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Vec<Task>> {
    Ok(task_list::read(kernel, &kernel.memory(memory), vcpus)?)
}

/// Reads all tasks with their stacks, as in one pause.
///
/// # Errors
/// When the task list is corrupt.
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

/// Checks that every sleeper is listed, and that its stack is complete and reliable: speed is worth
/// nothing if the result is wrong.
///
/// # Errors
/// When one is missing, or its stack is not reliable.
pub fn check(all: &[(Task, Stack)], sleepers: u32) -> Result<()> {
    // Of ten sleepers, one waits for a process and one for a thread (guests/programs/sleeper.c).
    // All are named after what they sleep in.
    let expected = usize::try_from(sleepers / 10 * 12)?;
    let asleep = all
        .iter()
        .filter(|(task, _)| task.comm.starts_with("sleep-"));
    let mut found = 0;
    for (task, stack) in asleep {
        let Task { pid, comm, .. } = task;
        ensure!(task.state_letter() == 'S', "{comm} ({pid}) does not sleep");
        ensure!(stack.is_reliable(), "{comm} ({pid}): {}", stack.verdict);
        // The system call, the function that it waits in, and the scheduler.
        let frames = stack.frames.len();
        ensure!(frames >= 4, "{comm} ({pid}) has {frames} frames");
        found += 1;
    }
    ensure!(found == expected, "{found} sleepers and not {expected}");
    Ok(())
}

/// Checks that walking the stacks with several threads gave the same as walking each by itself.
///
/// # Errors
/// When a stack differs.
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
