//! What introspect says of a core file.

use std::{collections::BTreeMap, path::Path};

use anyhow::Result;
use introspect::{CoreFile, Kernel, Stack, Task, TasksError, Unwinder, task_list};

/// A core file, read.
#[derive(Debug)]
pub struct Ours {
    /// All tasks with their stacks, by the address of their `task_struct`.
    pub tasks: BTreeMap<u64, (Task, Stack)>,
    kernel: Kernel,
}

impl Ours {
    /// Reads all tasks and stacks; `Err` inside is the lock that was held.
    pub fn read(path: &Path) -> Result<Result<Ours, &'static str>> {
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
        Ok(Ok(Ours { tasks, kernel }))
    }

    /// `symbol+offset` of an address.
    pub fn name(&self, address: u64) -> String {
        match self.kernel.symbolize(introspect::Gva(address)) {
            Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
            None => format!("{address:#x}"),
        }
    }
}
