//! What goes over the control socket, as JSON: the same types for the server that writes it and the client that reads it.
//!
//! Patches are told as [`patcher::PatchStatus`]. Field names and meanings are promised in `docs/ABI`.

use std::time::Duration;

use introspect::{PatchState, TaskKind, Verdict};
use patcher::{Mode, PauseReport};
use serde::{Deserialize, Serialize};

/// `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Always `outpatch`.
    pub name: String,
    /// The version of the VMM that answers.
    pub version: String,
}

/// Whether the guest's vCPUs run, as far as the operator decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// They run.
    Running,
    /// They stand still until told to run.
    Paused,
}

/// `GET /vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Running or paused.
    pub state: VmState,
    /// How many vCPUs it has.
    pub cpus: u32,
    /// Its RAM in bytes.
    pub memory: u64,
    /// The process id of the VMM.
    pub pid: u32,
    /// The release of the guest's kernel, as `uname -r` says; `null` until it has been found.
    pub kernel: Option<String>,
    /// The pauses that looking at the guest and patching it have cost since it started; the operator's own are not in it.
    pub pauses: PauseReport,
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmChange {
    /// What the guest shall be.
    pub state: VmState,
}

/// The query of `POST /patches`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyQuery {
    /// How tasks are to move.
    #[serde(default)]
    pub mode: Mode,
    /// As in [`AnswerQuery`].
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// As in [`AnswerQuery`].
    #[serde(default)]
    pub tasks: TasksAsked,
}

/// The query of `GET` and `PATCH /patches/{name}`: what the answer is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerQuery {
    /// How many milliseconds it may wait for the end of the transition.
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// Which tasks it tells of.
    #[serde(default)]
    pub tasks: TasksAsked,
}

/// The tasks of a transition that an answer tells of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TasksAsked {
    /// Every task.
    #[default]
    All,
    /// Those that still keep the old state.
    Waiting,
}

/// The body of `PATCH /patches/{name}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchChange {
    /// `false`: revert it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// With `enabled`: how tasks are to move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// `true`: turn the transition that runs round, whichever way it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,
    /// `true`: move every task now, wherever it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    /// `true`: send the fake signal to tasks that keep the old state, in the transition that runs (or that `enabled` begins).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<bool>,
    /// With `signal`: only from so many milliseconds after the transition's start on.
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
    /// Where the core goes: an absolute path, as the VMM sees the file system; no file may be there.
    pub path: String,
}

/// What `POST /dumps` has made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// The core.
    pub path: String,
    /// Its length; memory that is zero takes no room on the disk.
    pub bytes: u64,
    /// How long the guest stood still for it.
    pub paused_us: u64,
}

/// One task of `GET /tasks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Thread id; 0 for idle tasks.
    pub pid: i32,
    /// Process id.
    pub tgid: i32,
    /// The letter that `ps` shows.
    pub state: char,
    /// What sort of task.
    pub kind: TaskKind,
    /// The vCPU that runs it, if one does. Of a vCPU in the middle of a context switch it is not certain, and no task has it.
    pub vcpu: Option<u32>,
    /// The CPU it last ran on, or whose idle task it is.
    pub cpu: Option<u32>,
    /// As `/proc/PID/patch_state` has it: -1, 0 or 1; `null` in a kernel without `CONFIG_LIVEPATCH`.
    pub patch_state: Option<i32>,
    /// Its name.
    pub comm: String,
}

/// `GET /tasks/{pid}/stack`, and one of `GET /stacks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStack {
    /// Whose stack.
    pub task: Task,
    /// Whether every function that the task is in is among the frames.
    pub reliable: bool,
    /// Why not, when it is not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// Innermost first; empty for a task in user mode.
    pub frames: Vec<StackFrame>,
}

/// One frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackFrame {
    /// The address, `0x…`: where the task executes next in this function, or returns to.
    pub ip: String,
    /// `symbol+0xoffset/0xsize`, with ` [module]` behind it for a module's; just the address when no symbol covers it.
    pub symbol: String,
    /// A frame of the scheduler itself, which `/proc/PID/stack` leaves out at the top.
    pub scheduler: bool,
}

/// One symbol of `GET /symbols`: a line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// Its address, `0x…`.
    pub address: String,
    /// The type's letter.
    #[serde(rename = "type")]
    pub letter: char,
    /// Its name.
    pub name: String,
    /// The module that it is in, or what the kernel puts in its place; `null` for the kernel's own.
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
        }
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

/// What every refused request answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What sort, in a word for programs; see `docs/ABI/testing/rest-errors`.
    pub kind: String,
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it, in one line.
    pub detail: String,
}
