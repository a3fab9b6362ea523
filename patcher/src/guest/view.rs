//! A view of a paused guest: its tasks, their stacks, and the vCPUs that run them, as of one pause.
//!
//! What has not changed since the tasks were last read comes from the cache of
//! [`introspect::task_list`]. This module only reads, and decides nothing: whether a task may
//! switch is decided in [`stack_checks`](crate::transition::stack_checks).

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use introspect::task_list::{CachedTask, TaskCache};
use introspect::unwind::Unwinder;
use introspect::{
    Frame, Gva, GvaRange, Kernel, KernelMemory, PatchState, PhysMemory, Stack, Task, VcpuRegs,
};

use crate::error::StepError;
use crate::guest::code_set::{CodeName, CodeSet};
use crate::guest::symbolize::{self, LoadedModules};

/// The tasks of a paused guest.
pub struct GuestView<'a> {
    /// The guest's kernel.
    pub kernel: &'a Kernel,
    /// The guest's memory, valid for this pause.
    pub memory: KernelMemory<'a>,
    task_cache: &'a TaskCache,
    unwinder: &'a Unwinder,
    vcpus: &'a [VcpuRegs],
    /// How many stacks were walked.
    walked: Cell<usize>,
    /// The description of each address that blocks, with its code range: thousands of tasks can
    /// sleep at the same address.
    descriptions: RefCell<HashMap<Gva, (GvaRange, String)>>,
}

impl<'a> GuestView<'a> {
    /// Reads the tasks. What has not changed since `task_cache` was last refreshed is taken from
    /// it.
    ///
    /// # Errors
    /// [`StepError::Busy`] if the task lists are being changed.
    pub fn new(
        kernel: &'a Kernel,
        unwinder: &'a Unwinder,
        task_cache: &'a mut TaskCache,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<GuestView<'a>, StepError> {
        task_cache.refresh(kernel, unwinder, &kernel.memory(memory), vcpus)?;
        Ok(GuestView::of_cache(
            kernel, unwinder, task_cache, memory, vcpus,
        ))
    }

    /// The tasks in `task_cache`, which were read in this pause.
    #[must_use]
    pub fn of_cache(
        kernel: &'a Kernel,
        unwinder: &'a Unwinder,
        task_cache: &'a TaskCache,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> GuestView<'a> {
        GuestView {
            kernel,
            memory: kernel.memory(memory),
            task_cache,
            unwinder,
            vcpus,
            walked: Cell::new(0),
            descriptions: RefCell::default(),
        }
    }

    /// Every task, with its stack if that is cached. A task's number is its position here.
    #[must_use]
    pub fn cached(&self) -> &'a [CachedTask] {
        self.task_cache.tasks()
    }

    /// Every task.
    pub fn tasks(&self) -> impl Iterator<Item = &'a Task> + use<'a> {
        self.cached().iter().map(|cached| &cached.task)
    }

    /// The patch state of task `at`, as read for this view.
    #[must_use]
    pub fn patch_state(&self, at: usize) -> Option<PatchState> {
        self.task_cache.patch_state(at)
    }

    /// The modules that the guest has loaded, with their symbols.
    #[must_use]
    pub fn loaded_modules(&self) -> LoadedModules {
        symbolize::loaded(self.kernel, &self.memory)
    }

    /// The registers of the vCPU that runs `task`, if any does.
    #[must_use]
    pub fn vcpu_of(&self, task: &Task) -> Option<&VcpuRegs> {
        let index = task.vcpu?;
        self.vcpus.iter().find(|vcpu| vcpu.index == index)
    }

    /// The stack of a task, walked if it is not cached.
    #[must_use]
    pub fn stack(&self, cached: &'a CachedTask) -> Cow<'a, Stack> {
        if !cached.is_walked() {
            self.walked.set(self.walked.get() + 1);
        }
        cached.stack(self.unwinder, &self.memory, self.vcpu_of(&cached.task))
    }

    /// The stacks of all tasks, in their order.
    #[must_use]
    pub fn stacks(&self) -> Vec<Cow<'a, Stack>> {
        let cached = self.cached().iter();
        let known: Vec<_> = cached
            .map(|cached| (cached, cached.cached_stack()))
            .collect();
        let others = known.iter().filter(|(_, known)| known.is_none());
        let others: Vec<&Task> = others.map(|(cached, _)| &cached.task).collect();
        let walked = self.unwinder.stacks(&self.memory, &others, self.vcpus);
        self.walked.set(self.walked.get() + walked.len());
        let mut walked = walked.into_iter().map(Cow::Owned);
        let known = known.into_iter();
        known
            .filter_map(|(_, known)| known.map(Cow::Borrowed).or_else(|| walked.next()))
            .collect()
    }

    /// The tasks that vCPUs run.
    pub fn running(&self) -> impl Iterator<Item = &'a CachedTask> + use<'a> {
        self.task_cache.running()
    }

    /// Whether the prewalk found the stack of task `at` reliable and free of `code`, and the task
    /// has not run since. The stack of a running task is never cached, so this is false for it.
    #[must_use]
    pub fn is_known_clear(&self, at: usize, code: &CodeSet) -> bool {
        self.task_cache.is_tagged(at, code.id())
    }

    /// How many stacks were walked for this view; the others were cached.
    #[must_use]
    pub fn walked(&self) -> usize {
        self.walked.get()
    }

    /// A vCPU that will take an interrupt soon, and the number of its CPU: rather one with
    /// interrupts enabled than one without, and then rather one in user mode.
    #[must_use]
    pub fn interruptible_vcpu(&self) -> Option<(&VcpuRegs, u32)> {
        const IF: u64 = 1 << 9;
        let running = self.task_cache.running().filter_map(|cached| {
            let vcpu = self.vcpu_of(&cached.task)?;
            (vcpu.online && !vcpu.foreign).then_some((vcpu, cached.task.cpu?))
        });
        running.max_by_key(|(vcpu, _)| (vcpu.rflags & IF != 0, vcpu.cpl))
    }

    /// Checks that the task of every vCPU is known. A task that has just left the task lists can
    /// still run kernel code, and would be overlooked.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first vCPU whose task is not known.
    pub fn check_vcpus_have_tasks(&self) -> Result<(), StepError> {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.online) {
            if vcpu.foreign {
                return Err(StepError::Busy(format!(
                    "vCPU {} is not executing the guest's own kernel",
                    vcpu.index
                )));
            }
            let runs_here = |cached: &CachedTask| cached.task.vcpu == Some(vcpu.index);
            if !self.task_cache.running().any(runs_here) {
                return Err(StepError::Busy(format!(
                    "vCPU {} is between two tasks",
                    vcpu.index
                )));
            }
        }
        Ok(())
    }

    /// The place of `frame`, which is in `range`, the code of this name.
    #[must_use]
    pub fn describe_frame(&self, frame: &Frame, range: GvaRange, name: &CodeName) -> String {
        let mut descriptions = self.descriptions.borrow_mut();
        let known = descriptions.get(&frame.ip);
        if let Some((_, text)) = known.filter(|(other, _)| *other == range) {
            return text.clone();
        }
        let offset = frame.ip.since(range.start);
        let text = match name {
            CodeName::Function { name, patch } => format!("in {name}+{offset:#x} [{patch}]"),
            CodeName::Stubs(patch) => format!("in the entry stubs of {patch}"),
            CodeName::Patch(patch) => format!("in the code of {patch}"),
            CodeName::Kernel(name) => match self.kernel.symbolize(frame.ip) {
                Some((symbol, offset)) if symbol.name == name => format!("in {name}+{offset:#x}"),
                Some((symbol, offset)) => format!("in {name} ({}+{offset:#x})", symbol.name),
                None => format!("in {name}"),
            },
        };
        descriptions.insert(frame.ip, (range, text.clone()));
        text
    }

    /// Why the stack is unreliable, and after which frame.
    #[must_use]
    pub fn describe_unreliable(&self, stack: &Stack, reason: &str) -> String {
        let last = stack.frames.last().map_or(Gva::NULL, |frame| frame.ip);
        let after = match (self.unwinder.region_name(last), self.kernel.symbolize(last)) {
            (Some(region), _) => format!(", after a frame in [{region}]"),
            (None, Some((symbol, offset))) => format!(", after {}+{offset:#x}", symbol.name),
            (None, None) => String::new(),
        };
        format!("unreliable stack: {reason}{after}")
    }
}
