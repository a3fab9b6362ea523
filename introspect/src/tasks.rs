//! All tasks of a guest: processes, threads, kernel threads and idle tasks.
//!
//! Knows the lists that tasks are on and the lock that guards them; it must not know stacks beyond which task a vCPU is on
//! ([`crate::tasks_vcpus`]). Only to be trusted while all vCPUs are paused.
//!
//! Follows `include/linux/sched/signal.h: for_each_process_thread` and `kernel/fork.c: copy_process`.

use std::collections::HashMap;

use crate::{
    addr::Gva,
    kernel::Kernel,
    reader::{Field, KernelMemory, ReadError},
    record::Records,
    stacks_cpu::{PlacesError, StackPlaces},
    symbols::SymbolError,
    task::{PatchState, Task, TaskKind},
    tasks_vcpus::{self, OnCpu},
    vcpu::VcpuRegs,
};

/// More tasks than any guest has: a kernel with 128 GiB allows itself about so many (`kernel/fork.c: set_max_threads`). They take
/// some 300 MiB here, and task structures in a hostile guest can overlap.
pub const MAX_TASKS: usize = 1 << 20;

const PF_IDLE: u32 = 0x2;
const PF_IO_WORKER: u32 = 0x10;
const PF_USER_WORKER: u32 = 0x4000;
const PF_KTHREAD: u32 = 0x20_0000;

/// Why the tasks cannot be told now.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TasksError {
    /// The lists are being changed: resume the guest for a moment and look again.
    #[error("{0} is held for writing")]
    Busy(&'static str),
    /// Memory that the lists lead to cannot be read.
    #[error("cannot read the list of tasks: {0}")]
    Read(#[from] ReadError),
    /// A symbol is missing.
    #[error("cannot find the list of tasks: {0}")]
    Symbol(#[from] SymbolError),
    /// The stacks of CPUs could not be found, and so not which task is on which.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// A task is on the lists twice: a cycle.
    #[error("the list of tasks leads back to {0}")]
    Cycle(Gva),
    /// A process whose threads do not include its first one: the list of processes could be walked for ever.
    #[error("the first thread of the process {0} is not among its threads")]
    Leaderless(Gva),
    /// More tasks than a kernel can have.
    #[error("more than {MAX_TASKS} tasks")]
    TooMany,
    /// The kernel counts its tasks, and the lists hold another number.
    #[error("the lists hold {found} tasks and the kernel counts {counted}")]
    Miscounted {
        /// Tasks on the lists.
        found: u64,
        /// What `nr_threads` says.
        counted: u64,
    },
}

/// All tasks, each with the vCPU that runs it: threads in the order of the lists, then idle tasks by CPU, then any task that a
/// CPU still runs although it has left the lists (it is about to die).
///
/// Reads the list of processes, each one's list of threads, `idle_threads`, and what the vCPUs' registers lead to. The lists change only
/// under `tasklist_lock` held for writing. What a task changes of itself, it changes under no lock that could be looked at: a name can be
/// half old and half new. Linear in the number of tasks, of which there are at most [`MAX_TASKS`].
///
/// # Errors
/// [`TasksError::Busy`] when the lists are being changed; the others when they are broken.
pub fn tasks(
    kernel: &Kernel,
    memory: &KernelMemory<'_>,
    vcpus: &[VcpuRegs],
) -> Result<Vec<Task>, TasksError> {
    check_lock(kernel, memory)?;
    let reader = TaskReader::new(kernel, memory);
    let mut list = Listing::default();
    list.threads(&reader, kernel.symbols.address("init_task")?)?;
    check_count(kernel, memory, list.tasks.len())?;
    list.idle(&reader)?;
    let places = StackPlaces::resolve(kernel)?;
    let running = tasks_vcpus::attribute(kernel, memory, &places, vcpus);
    list.attribute(&reader, &running);
    if let Ok(online) = kernel.percpu.online(memory) {
        let all_known = vcpus.iter().filter(|vcpu| vcpu.online).count() == running.len();
        list.settle_offline_idle(&online, all_known);
    }
    Ok(list.tasks)
}

/// The lists change under `tasklist_lock` held for writing; readers do them no harm.
fn check_lock(kernel: &Kernel, memory: &KernelMemory<'_>) -> Result<(), TasksError> {
    let lock = kernel.symbols.address("tasklist_lock")?;
    if kernel.layout.lock.rwlock_writer.is_held(memory, lock)? {
        return Err(TasksError::Busy("tasklist_lock"));
    }
    Ok(())
}

/// `nr_threads` changes with the lists, under the same lock. It does not count the boot CPU's idle task, which heads them.
fn check_count(kernel: &Kernel, memory: &KernelMemory<'_>, found: usize) -> Result<(), TasksError> {
    let Ok(counter) = kernel.symbols.address("nr_threads") else {
        return Ok(());
    };
    let counted = u64::from(memory.u32(counter)?) + 1;
    let found = found as u64;
    if found == counted {
        Ok(())
    } else {
        Err(TasksError::Miscounted { found, counted })
    }
}

#[derive(Debug, Default)]
struct Listing {
    tasks: Vec<Task>,
    /// Where in `tasks` each is.
    seen: HashMap<Gva, usize>,
}

impl Listing {
    /// Every thread of every process, from the boot CPU's idle task on.
    fn threads(&mut self, reader: &TaskReader<'_, '_>, init_task: Gva) -> Result<(), TasksError> {
        let layout = &reader.kernel.layout;
        let mut leader = init_task;
        loop {
            reader.fields.hold(leader);
            let signal = reader.fields.pointer(layout.task.signal.of(leader))?;
            let head = layout.signal.thread_head.of(signal);
            let mut node = reader.memory.pointer(layout.list_next.of(head))?;
            while node != head {
                let thread = layout.task.thread_node.container(node);
                self.add(reader.read(thread)?)?;
                node = reader.fields.pointer(layout.list_next.of(node))?;
            }
            if !self.seen.contains_key(&leader) {
                return Err(TasksError::Leaderless(leader));
            }
            let next = reader
                .fields
                .pointer(layout.list_next.of(layout.task.tasks.of(leader)))?;
            leader = layout.task.tasks.container(next);
            if leader == init_task {
                return Ok(());
            }
            if self.seen.contains_key(&leader) {
                return Err(TasksError::Cycle(leader));
            }
        }
    }

    fn add(&mut self, task: Task) -> Result<(), TasksError> {
        if self.tasks.len() >= MAX_TASKS {
            return Err(TasksError::TooMany);
        }
        if self.seen.insert(task.addr, self.tasks.len()).is_some() {
            return Err(TasksError::Cycle(task.addr));
        }
        self.tasks.push(task);
        Ok(())
    }

    /// Idle tasks are on no list; the boot CPU's is `init_task`.
    fn idle(&mut self, reader: &TaskReader<'_, '_>) -> Result<(), TasksError> {
        let percpu = &reader.kernel.percpu;
        let variable = reader.kernel.symbols.address("idle_threads")?;
        for cpu in percpu.cpus() {
            let Some(slot) = percpu.address(variable, *cpu) else {
                continue;
            };
            let idle = reader.memory.pointer(slot)?;
            if idle.is_null() {
                continue;
            }
            if !self.seen.contains_key(&idle) {
                self.add(reader.read(idle)?)?;
            }
            let known = self.seen.get(&idle);
            if let Some(task) = known.and_then(|&index| self.tasks.get_mut(index)) {
                task.kind = TaskKind::Idle;
                task.cpu = Some(*cpu);
            }
        }
        Ok(())
    }

    /// Says of each running task which vCPU runs it. A task that releases itself has left the lists and still runs.
    fn attribute(&mut self, reader: &TaskReader<'_, '_>, running: &[OnCpu]) {
        for on in running {
            if !self.seen.contains_key(&on.task)
                && let Ok(task) = reader.read(on.task)
            {
                self.seen.insert(task.addr, self.tasks.len());
                self.tasks.push(task);
            }
        }
        let by_task: HashMap<Gva, &OnCpu> = running.iter().map(|on| (on.task, on)).collect();
        for task in &mut self.tasks {
            if let Some(on) = by_task.get(&task.addr) {
                task.vcpu = Some(on.vcpu);
                task.cpu = Some(on.cpu);
            }
        }
    }

    /// `kernel/sched/core.c: init_idle` says of each idle task that it is on its CPU, also when that CPU has never started.
    /// Where every vCPU that runs is accounted for, it runs nowhere. `online` rises.
    fn settle_offline_idle(&mut self, online: &[u32], all_known: bool) {
        let idle = |task: &&mut Task| task.kind == TaskKind::Idle && task.vcpu.is_none();
        for task in self.tasks.iter_mut().filter(idle) {
            // Any task can call itself idle: a look through all CPUs for each would be too many.
            let offline = |cpu| online.binary_search(&cpu).is_err();
            if all_known && task.cpu.is_some_and(offline) {
                task.on_cpu = false;
            }
        }
    }
}

/// Reads one `task_struct`.
struct TaskReader<'a, 'm> {
    kernel: &'a Kernel,
    memory: &'a KernelMemory<'m>,
    fields: Records<'a, 'm>,
    /// `PF_USER_WORKER` where the kernel has it: the bit meant something else before.
    worker: u32,
}

/// As many bytes of a task's name are shown (`TASK_COMM_LEN`, without its end).
const COMM: usize = 15;

impl<'a, 'm> TaskReader<'a, 'm> {
    fn new(kernel: &'a Kernel, memory: &'a KernelMemory<'m>) -> Self {
        let has_user_workers = kernel.symbols.contains("vhost_task_create");
        TaskReader {
            kernel,
            memory,
            fields: Records::new(memory, fields(kernel)),
            worker: if has_user_workers {
                PF_IO_WORKER | PF_USER_WORKER
            } else {
                PF_IO_WORKER
            },
        }
    }

    fn read(&self, addr: Gva) -> Result<Task, ReadError> {
        let layout = &self.kernel.layout.task;
        let task = &self.fields;
        task.hold(addr);
        let word = |field| task.field(addr, field);
        let flags = task.u32(layout.flags.of(addr))?;
        Ok(Task {
            addr,
            pid: task.i32(layout.pid.of(addr))?,
            tgid: task.i32(layout.tgid.of(addr))?,
            comm: task.cstr::<COMM>(layout.comm.of(addr))?,
            kind: self.kind(flags),
            state: word(layout.state)?,
            exit_state: task.u32(layout.exit_state.of(addr))?,
            flags,
            tif: word(layout.thread_flags)?,
            on_cpu: word(layout.on_cpu)? != 0,
            cpu: task.u32(layout.cpu.of(addr)).ok(),
            vcpu: None,
            patch_state: self.patch_state(addr)?,
            sp: Gva(word(layout.sp)?),
            stack: Gva(word(layout.stack)?),
        })
    }

    fn kind(&self, flags: u32) -> TaskKind {
        match flags {
            _ if flags & PF_IDLE != 0 => TaskKind::Idle,
            _ if flags & PF_KTHREAD != 0 => TaskKind::Kthread,
            _ if flags & self.worker != 0 => TaskKind::Worker,
            _ => TaskKind::User,
        }
    }

    fn patch_state(&self, addr: Gva) -> Result<Option<PatchState>, ReadError> {
        self.kernel
            .livepatch
            .as_ref()
            .map(|livepatch| {
                self.fields
                    .i32(livepatch.patch_state.of(addr))
                    .map(PatchState::from)
            })
            .transpose()
    }
}

/// What is read of every task.
fn fields(kernel: &Kernel) -> Vec<Field> {
    let task = &kernel.layout.task;
    let mut fields = vec![
        task.thread_flags,
        task.cpu,
        task.state,
        task.exit_state,
        task.stack,
        task.flags,
        task.on_cpu,
        task.tasks,
        task.thread_node,
        task.pid,
        task.tgid,
        task.comm,
        task.signal,
        task.sp,
    ];
    fields.extend(
        kernel
            .livepatch
            .as_ref()
            .map(|livepatch| livepatch.patch_state),
    );
    fields
}
