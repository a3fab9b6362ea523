//! A core file as introspect reads it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use introspect::{CoreFile, Gva, Kernel, Stack, Task, TasksError, Unwinder, task_list};

/// All tasks and stacks of a core file.
#[derive(Debug)]
pub struct IntrospectedCore {
    /// All tasks with their stacks, by the address of their `task_struct`.
    pub tasks: BTreeMap<u64, (Task, Stack)>,
    kernel: Kernel,
}

impl IntrospectedCore {
    /// Reads all tasks and stacks. The inner `Err` is the lock that a task in the guest held, so
    /// that the task list cannot be read.
    pub fn read(path: &Path) -> Result<Result<IntrospectedCore, &'static str>> {
        let core = CoreFile::open(path)?;
        let kernel = Kernel::find(&core, core.vcpus())?;
        let memory = kernel.memory(&core);
        let list = match task_list::read(&kernel, &memory, core.vcpus()) {
            Err(TasksError::Busy(lock)) => return Ok(Err(lock)),
            list => list?,
        };
        let mut unwinder = Unwinder::new(&kernel, &memory)?;
        unwinder.refresh(&kernel, &memory)?;
        let mut tasks = BTreeMap::new();
        for task in list {
            let mut vcpus = core.vcpus().iter();
            let regs = vcpus.find(|vcpu| task.vcpu == Some(vcpu.index));
            let stack = unwinder.stack(&memory, &task, regs);
            tasks.insert(task.addr.0, (task, stack));
        }
        Ok(Ok(IntrospectedCore { tasks, kernel }))
    }

    /// `symbol+offset` of an address.
    pub fn name(&self, address: u64) -> String {
        match self.kernel.symbolize(Gva(address)) {
            Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
            None => format!("{address:#x}"),
        }
    }
}
