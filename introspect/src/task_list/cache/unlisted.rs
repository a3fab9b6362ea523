//! The tasks that may be on no list: the idle tasks, and those that vCPUs run.
//!
//! This module adds them to the tasks of the lists, and sets what is known of a task by its CPU; it
//! must not know how the lists are walked.

use crate::task::TaskKind;
use crate::task::reader::TaskReader;
use crate::task_list::cache::TaskCache;
use crate::task_list::entry::CachedTask;
use crate::task_list::error::TasksError;
use crate::task_list::on_cpu::RunningTask;

impl TaskCache {
    /// Adds the idle tasks, which are on no list, except the boot CPU's: that is `init_task`.
    pub(super) fn add_idle_tasks(&mut self, reader: &TaskReader<'_, '_>) -> Result<(), TasksError> {
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
            if !self.index.contains_key(&idle) {
                self.add(CachedTask::read(reader, idle)?, false)?;
            }
            let at = self.index.get(&idle);
            if let Some(entry) = at.and_then(|&at| self.entries.get_mut(at)) {
                entry.task.kind = TaskKind::Idle;
                entry.task.cpu = Some(*cpu);
            }
        }
        Ok(())
    }

    /// Sets the vCPU of each running task. A task that releases itself has left the lists and still
    /// runs: it is added here.
    pub(super) fn set_vcpus(&mut self, reader: &TaskReader<'_, '_>, running: &[RunningTask]) {
        self.running.clear();
        for on in running {
            if !self.index.contains_key(&on.task)
                && let Ok(entry) = CachedTask::read(reader, on.task)
            {
                self.index.insert(on.task, self.entries.len());
                self.push(entry, false);
            }
            let Some(&at) = self.index.get(&on.task) else {
                continue;
            };
            let entry = self.entries.get_mut(at);
            if let (Some(entry), Some(summary)) = (entry, self.summaries.get_mut(at)) {
                entry.task.vcpu = Some(on.vcpu);
                entry.task.cpu = Some(on.cpu);
                entry.drop_stack();
                summary.tag = None;
                self.running.push(at);
            }
        }
    }

    /// Clears `on_cpu` of the idle tasks of offline CPUs. `kernel/sched/core.c: init_idle` sets it
    /// for every idle task, also on a CPU that has never started. Where the task of every online
    /// vCPU is known, such an idle task runs nowhere. `online` is in ascending order. The boot
    /// CPU's idle task, which is on the lists, has run.
    pub(super) fn clear_offline_idle(&mut self, online: &[u32], all_known: bool) {
        let unlisted = self.entries.iter_mut().skip(self.listed);
        for task in unlisted
            .map(|entry| &mut entry.task)
            .filter(|task| task.kind == TaskKind::Idle && task.vcpu.is_none())
        {
            let offline = |cpu| online.binary_search(&cpu).is_err();
            if all_known && task.cpu.is_some_and(offline) {
                task.on_cpu = false;
            }
        }
    }
}
