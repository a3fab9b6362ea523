//! A view of a paused guest: its tasks, and the check of each task's stack for code that it must
//! not be in.
//!
//! The counterpart of `kernel/livepatch/transition.c: klp_check_stack`. Here alone is decided
//! whether a task may be switched. Only reads; must not know which code is searched for, or why.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt::Write as _;

use introspect::task_list::{CachedTask, TaskCache};
use introspect::unwind::Unwinder;
use introspect::{
    Frame, Gva, Kernel, KernelMemory, PatchState, PhysMemory, Stack, Task, VcpuRegs, Verdict,
};

use crate::error::StepError;
use crate::guest::code_set::CodeSet;
use crate::guest::symbolize::{self, LoadedModules};
use crate::report::task::SwitchedBy;

/// Whether a task is in code of a [`CodeSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StackCheck {
    /// It is not, so it may be switched; this is how that is known.
    Clear(SwitchedBy),
    /// It is: in this frame.
    Blocked(String),
    /// That is not known: this is why its stack is unreliable.
    Unknown(String),
}

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
    /// The description of each address that blocks, with the name of its code range: thousands of
    /// tasks can sleep at the same address.
    descriptions: RefCell<HashMap<Gva, (String, String)>>,
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
        let memory = kernel.memory(memory);
        task_cache.refresh(kernel, unwinder, &memory, vcpus)?;
        Ok(GuestView {
            kernel,
            memory,
            task_cache,
            unwinder,
            vcpus,
            walked: Cell::new(0),
            descriptions: RefCell::default(),
        })
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

    /// How many stacks were walked for this view; the others were cached.
    #[must_use]
    pub fn walked(&self) -> usize {
        self.walked.get()
    }

    /// Checks whether task `at` is in `code`: its stack must be reliable, and no frame of it in
    /// `code` (`kernel/livepatch/transition.c: klp_check_stack`, `klp_check_stack_func`). Unlike
    /// the kernel, this checks running tasks too: their vCPUs are stopped.
    #[must_use]
    pub fn check_stack(&self, at: usize, code: &CodeSet) -> StackCheck {
        // The stack of a running task is never cached, and so the task is never tagged.
        if self.task_cache.is_tagged(at, code.id()) {
            return StackCheck::Clear(SwitchedBy::Stack);
        }
        match self.cached().get(at) {
            Some(cached) => self.check_stack_of(cached, code),
            None => StackCheck::Unknown("there is no such task".into()),
        }
    }

    fn check_stack_of(&self, cached: &'a CachedTask, code: &CodeSet) -> StackCheck {
        let stack = self.stack(cached);
        if let Verdict::Unreliable(reason) = &stack.verdict {
            return StackCheck::Unknown(self.describe_unreliable(&stack, &reason.to_string()));
        }
        if let Some((frame, name)) = code.first_frame_in(&stack) {
            return StackCheck::Blocked(self.describe_frame(frame, name));
        }
        match self.vcpu_of(&cached.task) {
            Some(vcpu) if vcpu.cpl == 3 => StackCheck::Clear(SwitchedBy::UserMode),
            _ => StackCheck::Clear(SwitchedBy::Stack),
        }
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

    /// Checks that no task that a vCPU runs is in `code`.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first task that is, or may be.
    pub fn check_no_vcpu_in(&self, code: &CodeSet) -> Result<(), StepError> {
        let each = self.task_cache.running();
        check_all_clear(each.map(|cached| (&cached.task, self.check_stack_of(cached, code))))
    }

    /// Checks that no task is in `code`.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first task that is, or may be.
    pub fn check_no_task_in(&self, code: &CodeSet) -> Result<(), StepError> {
        let each = self.cached().iter().enumerate();
        check_all_clear(each.map(|(at, cached)| (&cached.task, self.check_stack(at, code))))
    }

    /// The range and symbol that `frame` is in; `name` is that of the range.
    fn describe_frame(&self, frame: &Frame, name: &str) -> String {
        let mut descriptions = self.descriptions.borrow_mut();
        let known = descriptions.get(&frame.ip);
        if let Some((_, text)) = known.filter(|(range, _)| range == name) {
            return text.clone();
        }
        let mut text = format!("in {name}");
        if let Some((symbol, offset)) = self.kernel.symbolize(frame.ip) {
            if symbol.name != name {
                let _ = write!(text, " ({}+{offset:#x})", symbol.name);
            } else {
                let _ = write!(text, "+{offset:#x}");
            }
        }
        descriptions.insert(frame.ip, (name.to_owned(), text.clone()));
        text
    }

    fn describe_unreliable(&self, stack: &Stack, reason: &str) -> String {
        let last = stack.frames.last().map_or(Gva::NULL, |frame| frame.ip);
        match self.kernel.symbolize(last) {
            Some((symbol, offset)) => {
                format!(
                    "unreliable stack: {reason}, after {}+{offset:#x}",
                    symbol.name
                )
            }
            None => format!("unreliable stack: {reason}"),
        }
    }
}

fn check_all_clear<'t>(
    mut each: impl Iterator<Item = (&'t Task, StackCheck)>,
) -> Result<(), StepError> {
    let found = each.find_map(|(task, check)| match check {
        StackCheck::Clear(_) => None,
        StackCheck::Blocked(blocker) | StackCheck::Unknown(blocker) => Some((task, blocker)),
    });
    match found {
        None => Ok(()),
        Some((task, blocker)) => Err(StepError::Busy(format!(
            "{} ({}): {blocker}",
            task.comm, task.pid
        ))),
    }
}
