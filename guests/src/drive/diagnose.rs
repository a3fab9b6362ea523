//! Explains why a guest does not answer: where in the kernel its tasks are, as outpatch sees them.
//! The text goes into the error of a shell command that did not return.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::drive::outpatch::Outpatch;

/// The states of tasks that should proceed soon: running or runnable, and uninterruptible.
const BUSY_STATES: [&str; 2] = ["R", "D"];
/// The names of tasks that the shell and its usual commands consist of.
const SHELL_TASKS: [&str; 5] = ["sh", "cat", "sort", "uniq", "grep"];
/// How many frames of each stack are printed: enough for an interrupt in an interrupt in a system
/// call.
const MAX_FRAMES: usize = 40;
/// Time between the two readings: tells a task that hangs from one that is slow.
const INTERVAL: Duration = Duration::from_secs(2);

/// Reads the stacks of the busy tasks twice. Never fails: an error becomes part of the text.
#[must_use]
pub fn explain(outpatch: &Outpatch) -> String {
    let first = busy_tasks(outpatch);
    thread::sleep(INTERVAL);
    let second = busy_tasks(outpatch);
    format!("its tasks:\n{first}and {INTERVAL:?} later:\n{second}")
}

/// A line for each distinct stack, with all tasks that have it.
fn busy_tasks(outpatch: &Outpatch) -> String {
    let stacks = match outpatch.json(&["stack"]) {
        Ok(Value::Array(stacks)) => stacks,
        Ok(other) => return format!("no stacks: {other}\n"),
        Err(error) => return format!("no stacks: {error:#}\n"),
    };
    let mut tasks_by_stack: BTreeMap<String, String> = BTreeMap::new();
    for stack in stacks.iter().filter(|stack| is_busy(&stack["task"])) {
        let task = &stack["task"];
        let symbols = stack["frames"].as_array().into_iter().flatten();
        let symbols: Vec<&str> = symbols
            .filter_map(|frame| frame["symbol"].as_str())
            .take(MAX_FRAMES)
            .collect();
        let tasks = tasks_by_stack.entry(symbols.join(" ")).or_default();
        // Writing to a string does not fail.
        let _ = write!(
            tasks,
            " {} {} {} vCPU {},",
            task["pid"], task["comm"], task["state"], task["vcpu"]
        );
    }
    tasks_by_stack
        .iter()
        .map(|(stack, tasks)| format!("  at {stack}:{tasks}\n"))
        .collect()
}

fn is_busy(task: &Value) -> bool {
    let one_of = |words: &[&str], field: &str| {
        let word = task[field].as_str();
        word.is_some_and(|word| words.contains(&word))
    };
    // A task on a vCPU can hold a lock whatever its state is; so can an idle task.
    let runs = !task["vcpu"].is_null();
    runs || (one_of(&BUSY_STATES, "state") && task["pid"] != 0) || one_of(&SHELL_TASKS, "comm")
}
