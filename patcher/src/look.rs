//! One look at a paused guest: its tasks, and where each stands towards a patch.
//!
//! This is the one place that decides whether a task may be moved. It only reads.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};

use introspect::stacks::Unwinder;
use introspect::survey::{Seen, Survey};
use introspect::tasks::TasksError;
use introspect::{
    Frame, Gva, GvaRange, Kernel, KernelMemory, PhysMemory, Stack, Task, VcpuRegs, Verdict,
};

use crate::error::PatchError;
use crate::naming::Names;
use crate::patch::Patch;
use crate::quiet::Stop;
use crate::status::TaskWay;

/// Code that a task must not be in, each piece with its name.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    pieces: Vec<(GvaRange, String)>,
    /// A number that a watch over other code does not have.
    id: u64,
}

impl Watch {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Watch {
        Watch::default()
    }

    /// Adds a piece of code.
    pub fn add(&mut self, code: GvaRange, name: impl Into<String>) {
        let mut hasher = DefaultHasher::new();
        (self.id, code.start, code.end).hash(&mut hasher);
        self.id = hasher.finish();
        self.pieces.push((code, name.into()));
    }

    /// Notes of everybody whose stack is known already whether it is free of this code, ahead of a look.
    pub fn note_ahead(&self, all: &[Seen]) {
        for seen in all.iter().filter(|seen| seen.is_walked()) {
            if let Some(stack) = seen.known_stack()
                && stack.is_reliable()
                && self.first_hit(stack).is_none()
            {
                seen.set_mark(self.id);
            }
        }
    }

    /// The piece that `frame` is in, as `klp_check_stack_func` asks, and stricter: a call can be a function's last instruction,
    /// and then its return address lies behind the function.
    #[must_use]
    pub fn hit(&self, frame: &Frame) -> Option<&str> {
        let inside = |code: &GvaRange| {
            code.contains(frame.ip) || (!frame.exact && code.contains(frame.ip.sub(1)))
        };
        let (_, name) = self.pieces.iter().find(|(code, _)| inside(code))?;
        Some(name)
    }

    /// The first frame of `stack` in any of the pieces, with the piece's name.
    #[must_use]
    pub fn first_hit<'s>(&self, stack: &'s Stack) -> Option<(&'s Frame, &str)> {
        stack
            .frames
            .iter()
            .find_map(|frame| Some((frame, self.hit(frame)?)))
    }
}

/// Where a task stands towards a [`Watch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is in none of the watched code, and this is how we know.
    Clean(TaskWay),
    /// It is, or may be, and this is why.
    Blocked(String),
}

/// A paused guest, as seen once.
pub struct Look<'a> {
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// Its memory, for this pause.
    pub memory: KernelMemory<'a>,
    /// Every task.
    pub seen: &'a [Seen],
    unwinder: &'a Unwinder,
    vcpus: &'a [VcpuRegs],
    walked: Cell<usize>,
}

impl<'a> Look<'a> {
    /// Looks; `survey` is what earlier looks left.
    ///
    /// # Errors
    /// [`Stop`]; busy when the task lists are being changed.
    pub fn take(
        kernel: &'a Kernel,
        unwinder: &'a Unwinder,
        survey: &'a mut Survey,
        memory: &'a dyn PhysMemory,
        vcpus: &'a [VcpuRegs],
    ) -> Result<Look<'a>, Stop> {
        let memory = kernel.memory(memory);
        survey.look(kernel, unwinder, &memory, vcpus)?;
        Ok(Look {
            kernel,
            memory,
            seen: survey.seen(),
            unwinder,
            vcpus,
            walked: Cell::new(0),
        })
    }

    /// Every task.
    pub fn tasks(&self) -> impl Iterator<Item = &'a Task> + use<'a> {
        self.seen.iter().map(|seen| &seen.task)
    }

    /// Names for the code on stacks.
    #[must_use]
    pub fn names<'n>(&'n self, patches: &'n [Patch]) -> Names<'n> {
        Names::new(self.kernel, self.unwinder, &self.memory, patches)
    }

    /// The registers that are `task`'s, when a vCPU runs it.
    #[must_use]
    pub fn vcpu_of(&self, task: &Task) -> Option<&VcpuRegs> {
        let index = task.vcpu?;
        self.vcpus.iter().find(|vcpu| vcpu.index == index)
    }

    /// The stack of a task.
    #[must_use]
    pub fn stack(&self, seen: &'a Seen) -> Cow<'a, Stack> {
        if !seen.is_walked() {
            self.walked.set(self.walked.get() + 1);
        }
        seen.stack(self.unwinder, &self.memory, self.vcpu_of(&seen.task))
    }

    /// How many stacks were walked in this look: the others were known.
    #[must_use]
    pub fn walked(&self) -> usize {
        self.walked.get()
    }

    /// Where a task stands.
    #[must_use]
    pub fn standing(&self, seen: &'a Seen, watch: &Watch) -> Standing {
        // A running task's stack is never kept, and so never marked.
        if seen.mark() == Some(watch.id) {
            return Standing::Clean(TaskWay::Stack);
        }
        let stack = self.stack(seen);
        if let Verdict::Unreliable(reason) = &stack.verdict {
            return Standing::Blocked(self.unreliable(&stack, &reason.to_string()));
        }
        if let Some((frame, name)) = watch.first_hit(&stack) {
            return Standing::Blocked(self.blocked_in(frame, name));
        }
        match self.vcpu_of(&seen.task) {
            Some(vcpu) if vcpu.cpl == 3 => Standing::Clean(TaskWay::UserMode),
            _ => Standing::Clean(TaskWay::Stack),
        }
    }

    /// A vCPU that will take an interrupt soon, and the number of its CPU: one in user mode or idle rather than one that has its
    /// interrupts off.
    #[must_use]
    pub fn interruptible_vcpu(&self) -> Option<(&VcpuRegs, u32)> {
        const IF: u64 = 1 << 9;
        let running = self.tasks().filter_map(|task| {
            let vcpu = self.vcpu_of(task)?;
            (vcpu.online && !vcpu.foreign).then_some((vcpu, task.cpu?))
        });
        running.max_by_key(|(vcpu, _)| (vcpu.rflags & IF != 0, vcpu.cpl))
    }

    /// No vCPU runs kernel code of a task that is in no list (one that has just left them): such a task would be overlooked.
    ///
    /// # Errors
    /// [`Stop::Busy`].
    pub fn every_vcpu_has_a_task(&self) -> Result<(), Stop> {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.online) {
            if vcpu.foreign {
                return Err(Stop::Busy(format!(
                    "vCPU {} is not executing the guest's own kernel",
                    vcpu.index
                )));
            }
            if !self.tasks().any(|task| task.vcpu == Some(vcpu.index)) {
                return Err(Stop::Busy(format!(
                    "vCPU {} is between two tasks",
                    vcpu.index
                )));
            }
        }
        Ok(())
    }

    /// No vCPU is in any of `watch`, for certain.
    ///
    /// # Errors
    /// [`Stop::Busy`].
    pub fn no_vcpu_in(&self, watch: &Watch) -> Result<(), Stop> {
        let running = self.seen.iter().filter(|seen| seen.task.vcpu.is_some());
        self.none_in(running, watch)
    }

    /// No task is in any of `watch`, for certain.
    ///
    /// # Errors
    /// [`Stop::Busy`] with the first that is, or may be.
    pub fn no_task_in(&self, watch: &Watch) -> Result<(), Stop> {
        self.none_in(self.seen.iter(), watch)
    }

    fn none_in(
        &self,
        mut tasks: impl Iterator<Item = &'a Seen>,
        watch: &Watch,
    ) -> Result<(), Stop> {
        let found = tasks.find_map(|seen| match self.standing(seen, watch) {
            Standing::Clean(_) => None,
            Standing::Blocked(why) => Some((&seen.task, why)),
        });
        match found {
            None => Ok(()),
            Some((task, why)) => Err(Stop::Busy(format!("{} ({}): {why}", task.comm, task.pid))),
        }
    }

    fn blocked_in(&self, frame: &Frame, name: &str) -> String {
        let mut text = format!("in {name}");
        if let Some((symbol, offset)) = self.kernel.symbolize(frame.ip) {
            if symbol.name != name {
                let _ = write!(text, " ({}+{offset:#x})", symbol.name);
            } else {
                let _ = write!(text, "+{offset:#x}");
            }
        }
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

impl From<TasksError> for Stop {
    fn from(error: TasksError) -> Self {
        match error {
            TasksError::Busy(_) | TasksError::Miscounted { .. } => Stop::Busy(error.to_string()),
            _ => Stop::Fail(PatchError::Guest(error.to_string())),
        }
    }
}
