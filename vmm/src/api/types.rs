//! The JSON of the control socket: the same types for the server and its clients.
//!
//! A patch is a [`patcher::PatchStatus`], the answer of a check a [`patcher::CheckReport`].
//! `docs/ABI` promises names and meanings of all fields.

use std::time::Duration;

use introspect::{PatchState, TaskKind, Verdict};
use patcher::{Mode, PauseReport, Reading};
use serde::{Deserialize, Serialize};

/// The answer of `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Always `outpatch`.
    pub name: String,
    /// The version of the VMM that answers.
    pub version: String,
}

/// Whether the guest runs. Short pauses that outpatch needs do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped until the operator resumes them.
    Paused,
    /// The vCPUs run, but the guest's kernel has panicked.
    Panicked,
}

/// What the operator can set [`VmState`] to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RequestedState {
    /// Let the vCPUs run.
    Running,
    /// Stop the vCPUs.
    Paused,
}

/// The answer of `GET /vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Whether the guest runs or is paused.
    pub state: VmState,
    /// The number of vCPUs.
    pub cpus: u32,
    /// The size of the RAM, in bytes.
    pub memory: u64,
    /// The process id of the VMM.
    pub pid: u32,
    /// The release of the guest's kernel, as `uname -r` prints it; `null` until it has been found.
    pub kernel: Option<String>,
    /// The pauses that outpatch has needed since the VM started, without the operator's own.
    pub pauses: PauseReport,
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmChange {
    /// The state that the guest is to have.
    pub state: RequestedState,
}

/// The query of `POST /patches`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyQuery {
    /// How tasks switch.
    #[serde(default)]
    pub mode: Mode,
    /// As in [`PatchQuery`].
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// As in [`PatchQuery`].
    #[serde(default)]
    pub tasks: TaskFilter,
}

/// The query of `GET` and `PATCH /patches/{name}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchQuery {
    /// How many milliseconds the answer may wait for the end of the transition.
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// Which tasks the answer has.
    #[serde(default)]
    pub tasks: TaskFilter,
}

/// Which tasks of a transition an answer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskFilter {
    /// Every task.
    #[default]
    All,
    /// The tasks that have not switched.
    Pending,
}

/// The body of `PATCH /patches/{name}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchChange {
    /// `false`: revert the patch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// With `enabled`: how tasks switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// `true`: reverse the running transition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,
    /// `true`: complete the running transition by switching every task, whatever it executes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// `true`: send the fake signal to tasks that have not switched, in the running transition or
    /// the one that `enabled` starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<bool>,
    /// With `signal`: not before so many milliseconds after the start of the transition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal_after_ms: Option<u64>,
}

impl PatchChange {
    /// Reverts the patch.
    #[must_use]
    pub fn revert(mode: Mode) -> PatchChange {
        PatchChange {
            enabled: Some(false),
            mode: Some(mode),
            ..PatchChange::default()
        }
    }

    /// Reverses the running transition.
    #[must_use]
    pub fn cancel() -> PatchChange {
        PatchChange {
            cancel: Some(true),
            ..PatchChange::default()
        }
    }

    /// Completes the running transition by switching every task.
    #[must_use]
    pub fn force() -> PatchChange {
        PatchChange {
            force: Some(true),
            ..PatchChange::default()
        }
    }

    /// Sends the fake signal; not before `after` has passed since the start of the transition.
    #[must_use]
    pub fn signal(after: Option<Duration>) -> PatchChange {
        PatchChange {
            signal: Some(true),
            signal_after_ms: after.map(|a| u64::try_from(a.as_millis()).unwrap_or(u64::MAX)),
            ..PatchChange::default()
        }
    }
}

/// The body of `POST /dumps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDump {
    /// The path of the core file: absolute, in the VMM's file system, and of no existing file.
    pub path: String,
}

/// The answer of `POST /dumps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// The path of the core file.
    pub path: String,
    /// The length of the file, in bytes; pages of zeroes take no space on disk.
    pub bytes: u64,
    /// How long the guest was paused for it, in microseconds.
    pub paused_us: u64,
}

/// A task in `GET /tasks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Thread id; 0 for idle tasks.
    pub pid: i32,
    /// Process id.
    pub tgid: i32,
    /// The state, as the letter that `ps` shows: `R S D T t X Z P I`.
    pub state: char,
    /// User task, kernel thread (`kthread`), idle task or worker.
    pub kind: TaskKind,
    /// The index of the vCPU that runs it, if one does. A vCPU in the middle of a context switch
    /// belongs to no task.
    pub vcpu: Option<u32>,
    /// The CPU that it last ran on, or whose idle task it is.
    pub cpu: Option<u32>,
    /// The value of `/proc/PID/patch_state`: -1, 0 or 1; `null` in a kernel without
    /// `CONFIG_LIVEPATCH`.
    pub patch_state: Option<i32>,
    /// The name, at most 15 bytes.
    pub comm: String,
    /// Why tasks may be missing from this answer, or be in it although they have ended: the guest
    /// cannot go on, and was in the middle of a change. The same in every task of an answer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub warning: Option<String>,
}

/// The answer of `GET /tasks/{pid}/stack`, and an element of `GET /stacks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStack {
    /// The task that has this stack.
    pub task: Task,
    /// Whether the frames have every function that the task is in.
    pub reliable: bool,
    /// Why the frames cannot be relied on, when they cannot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// The frames, innermost first; empty for a task in user mode.
    pub frames: Vec<StackFrame>,
}

/// One frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackFrame {
    /// The address at which the task continues in this function, as `0x…`.
    pub ip: String,
    /// `symbol+0xoffset/0xsize`, followed by ` [module]` for a module's symbol; only the address
    /// when no symbol covers it.
    pub symbol: String,
    /// Whether it is a frame of the scheduler, which `/proc/PID/stack` leaves out at the top.
    pub scheduler: bool,
}

/// A symbol in `GET /symbols`: a line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// The address, as `0x…`.
    pub address: String,
    /// The letter of the type, as in `nm`.
    #[serde(rename = "type")]
    pub letter: char,
    /// The symbol's name.
    pub name: String,
    /// The module, or what the kernel prints for code made at run time (`bpf`, …); `null` for the
    /// kernel's own symbols.
    pub module: Option<String>,
}

impl From<introspect::KallsymsEntry> for Symbol {
    fn from(symbol: introspect::KallsymsEntry) -> Symbol {
        Symbol {
            address: symbol.gva.to_string(),
            letter: symbol.letter,
            name: symbol.name,
            module: symbol.module,
        }
    }
}

impl From<&introspect::Task> for Task {
    fn from(task: &introspect::Task) -> Task {
        Task {
            pid: task.pid,
            tgid: task.tgid,
            state: task.state_letter(),
            kind: task.kind,
            vcpu: task.vcpu,
            cpu: task.cpu,
            patch_state: task.patch_state.map(|state| match state {
                PatchState::Idle => -1,
                PatchState::Unpatched => 0,
                PatchState::Patched => 1,
                PatchState::Invalid(raw) => raw,
            }),
            comm: task.comm.clone(),
            warning: None,
        }
    }
}

impl Task {
    /// The answer for tasks as they were read.
    pub fn of_reading(read: Reading<Vec<introspect::Task>>) -> Vec<Task> {
        let Reading { value, warning } = read;
        let with_warning = |task| Task {
            warning: warning.clone(),
            ..Task::from(task)
        };
        value.iter().map(with_warning).collect()
    }
}

impl TaskStack {
    /// The answer for a stack as it was read.
    pub fn of_reading(read: Reading<patcher::TaskStack>) -> TaskStack {
        let mut stack = TaskStack::from(read.value);
        stack.task.warning = read.warning;
        stack
    }

    /// The answer for stacks as they were read.
    pub fn list_of_reading(read: Reading<Vec<patcher::TaskStack>>) -> Vec<TaskStack> {
        let Reading { value, warning } = read;
        let stacks = value.into_iter();
        stacks
            .map(|value| {
                TaskStack::of_reading(Reading {
                    value,
                    warning: warning.clone(),
                })
            })
            .collect()
    }
}

impl From<patcher::TaskStack> for TaskStack {
    fn from(stack: patcher::TaskStack) -> TaskStack {
        let reason = match &stack.verdict {
            Verdict::Reliable => None,
            Verdict::Unreliable(reason) => Some(reason.to_string()),
        };
        TaskStack {
            task: Task::from(&stack.task),
            reliable: reason.is_none(),
            reason,
            frames: stack
                .frames
                .into_iter()
                .map(|frame| StackFrame {
                    ip: frame.ip.to_string(),
                    symbol: frame.name,
                    scheduler: frame.sched,
                })
                .collect(),
        }
    }
}

/// The answer to every refused request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The kind, as a word for programs; see `docs/ABI/testing/rest-errors`.
    pub kind: String,
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it, in one line.
    pub detail: String,
}
