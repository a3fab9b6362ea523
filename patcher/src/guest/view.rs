//! One look at a paused guest: its tasks, and where each stands towards a patch.
//!
//! This is the one place that decides whether a task may be moved. It only reads.

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

/// Where a task stands towards a [`CodeSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StackCheck {
    /// It is in none of the watched code, and this is how we know.
    Clear(SwitchedBy),
    /// It is in some of it, and this is where.
    Blocked(String),
    /// It may be: this is why nobody can tell.
    Unknown(String),
}

/// A paused guest, as seen once.
pub struct GuestView<'a> {
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// Its memory, for this pause.
    pub memory: KernelMemory<'a>,
    task_cache: &'a TaskCache,
    unwinder: &'a Unwinder,
    vcpus: &'a [VcpuRegs],
    walked: Cell<usize>,
    /// What was said of an address inside watched code, and of which piece: thousands sleep at the same place.
    said: RefCell<HashMap<Gva, (String, String)>>,
}

impl<'a> GuestView<'a> {
    /// Looks; `task_cache` is what earlier looks left.
    ///
    /// # Errors
    /// [`StepError`]; busy when the task lists are being changed.
    pub fn take(
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
            said: RefCell::default(),
        })
    }

    /// Every task, with what is known of it.
    #[must_use]
    pub fn cached(&self) -> &'a [CachedTask] {
        self.task_cache.tasks()
    }

    /// Every task.
    pub fn tasks(&self) -> impl Iterator<Item = &'a Task> + use<'a> {
        self.cached().iter().map(|seen| &seen.task)
    }

    /// The patch state of number `at` of them; without a look at the task where nothing about it has changed.
    #[must_use]
    pub fn patch_state(&self, at: usize) -> Option<PatchState> {
        self.task_cache.patch_state(at)
    }

    /// The modules that the guest has loaded, for names of the code on stacks.
    #[must_use]
    pub fn loaded(&self) -> LoadedModules {
        symbolize::loaded(self.kernel, &self.memory)
    }

    /// The registers that are `task`'s, when a vCPU runs it.
    #[must_use]
    pub fn vcpu_of(&self, task: &Task) -> Option<&VcpuRegs> {
        let index = task.vcpu?;
        self.vcpus.iter().find(|vcpu| vcpu.index == index)
    }

    /// The stack of a task.
    #[must_use]
    pub fn stack(&self, seen: &'a CachedTask) -> Cow<'a, Stack> {
        if !seen.is_walked() {
            self.walked.set(self.walked.get() + 1);
        }
        seen.stack(self.unwinder, &self.memory, self.vcpu_of(&seen.task))
    }

    /// The stacks of all tasks, in their order.
    #[must_use]
    pub fn stacks(&self) -> Vec<Cow<'a, Stack>> {
        let seen = self.cached().iter();
        let known: Vec<_> = seen.map(|seen| (seen, seen.cached_stack())).collect();
        let others = known.iter().filter(|(_, known)| known.is_none());
        let others: Vec<&Task> = others.map(|(seen, _)| &seen.task).collect();
        let walked = self.unwinder.stacks(&self.memory, &others, self.vcpus);
        self.walked.set(self.walked.get() + walked.len());
        let mut walked = walked.into_iter().map(Cow::Owned);
        let known = known.into_iter();
        known
            .filter_map(|(_, known)| known.map(Cow::Borrowed).or_else(|| walked.next()))
            .collect()
    }

    /// How many stacks were walked in this look: the others were known.
    #[must_use]
    pub fn walked(&self) -> usize {
        self.walked.get()
    }

    /// Where task number `at` stands.
    #[must_use]
    pub fn check(&self, at: usize, codes: &CodeSet) -> StackCheck {
        // A running task's stack is never kept, and so never marked.
        if self.task_cache.is_tagged(at, codes.mark()) {
            return StackCheck::Clear(SwitchedBy::Stack);
        }
        match self.cached().get(at) {
            Some(seen) => self.standing_of(seen, codes),
            None => StackCheck::Unknown("it is not there".into()),
        }
    }

    fn standing_of(&self, seen: &'a CachedTask, codes: &CodeSet) -> StackCheck {
        let stack = self.stack(seen);
        if let Verdict::Unreliable(reason) = &stack.verdict {
            return StackCheck::Unknown(self.unreliable(&stack, &reason.to_string()));
        }
        if let Some((frame, name)) = codes.first_frame_in(&stack) {
            return StackCheck::Blocked(self.inside(frame, name));
        }
        match self.vcpu_of(&seen.task) {
            Some(vcpu) if vcpu.cpl == 3 => StackCheck::Clear(SwitchedBy::UserMode),
            _ => StackCheck::Clear(SwitchedBy::Stack),
        }
    }

    /// A vCPU that will take an interrupt soon, and the number of its CPU: one in user mode or idle rather than one that has its
    /// interrupts off.
    #[must_use]
    pub fn interruptible_vcpu(&self) -> Option<(&VcpuRegs, u32)> {
        const IF: u64 = 1 << 9;
        let running = self.task_cache.running().filter_map(|seen| {
            let vcpu = self.vcpu_of(&seen.task)?;
            (vcpu.online && !vcpu.foreign).then_some((vcpu, seen.task.cpu?))
        });
        running.max_by_key(|(vcpu, _)| (vcpu.rflags & IF != 0, vcpu.cpl))
    }

    /// No vCPU runs kernel code of a task that is in no list (one that has just left them): such a task would be overlooked.
    ///
    /// # Errors
    /// [`StepError::Busy`].
    pub fn every_vcpu_has_a_task(&self) -> Result<(), StepError> {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.online) {
            if vcpu.foreign {
                return Err(StepError::Busy(format!(
                    "vCPU {} is not executing the guest's own kernel",
                    vcpu.index
                )));
            }
            let runs_here = |seen: &CachedTask| seen.task.vcpu == Some(vcpu.index);
            if !self.task_cache.running().any(runs_here) {
                return Err(StepError::Busy(format!(
                    "vCPU {} is between two tasks",
                    vcpu.index
                )));
            }
        }
        Ok(())
    }

    /// No vCPU is in any of `codes`, for certain.
    ///
    /// # Errors
    /// [`StepError::Busy`].
    pub fn no_vcpu_in(&self, codes: &CodeSet) -> Result<(), StepError> {
        let each = self.task_cache.running();
        none_blocked(each.map(|seen| (&seen.task, self.standing_of(seen, codes))))
    }

    /// No task is in any of `codes`, for certain.
    ///
    /// # Errors
    /// [`StepError::Busy`] with the first that is, or may be.
    pub fn no_task_in(&self, codes: &CodeSet) -> Result<(), StepError> {
        let each = self.cached().iter().enumerate();
        none_blocked(each.map(|(at, seen)| (&seen.task, self.check(at, codes))))
    }

    fn inside(&self, frame: &Frame, name: &str) -> String {
        let mut said = self.said.borrow_mut();
        if let Some((_, text)) = said.get(&frame.ip).filter(|(piece, _)| piece == name) {
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
        said.insert(frame.ip, (name.to_owned(), text.clone()));
        text
    }

    fn unreliable(&self, stack: &Stack, reason: &str) -> String {
        let last = stack.frames.last().map_or(Gva::NULL, |frame| frame.ip);
        match self.kernel.symbolize(last) {
            Some((symbol, offset)) => {
                format!(
                    "stack not reliable: {reason}, behind {}+{offset:#x}",
                    symbol.name
                )
            }
            None => format!("stack not reliable: {reason}"),
        }
    }
}

fn none_blocked<'t>(
    mut each: impl Iterator<Item = (&'t Task, StackCheck)>,
) -> Result<(), StepError> {
    let found = each.find_map(|(task, check)| match check {
        StackCheck::Clear(_) => None,
        StackCheck::Blocked(why) | StackCheck::Unknown(why) => Some((task, why)),
    });
    match found {
        None => Ok(()),
        Some((task, why)) => Err(StepError::Busy(format!(
            "{} ({}): {why}",
            task.comm, task.pid
        ))),
    }
}
