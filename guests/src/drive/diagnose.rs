//! Why a guest is silent: what outpatch sees its tasks do, for the error of a command that did not come back.

use std::{collections::BTreeMap, fmt::Write as _, thread, time::Duration};

use serde_json::Value;

use crate::drive::outpatch::Outpatch;

/// States of tasks that are not waiting for something far away: running or runnable, and uninterruptible.
const BUSY: [&str; 2] = ["R", "D"];
/// Of whom a silent shell is made.
const OF_THE_SHELL: [&str; 5] = ["sh", "cat", "sort", "uniq", "grep"];
/// How many frames of each are told: an interrupt in an interrupt in a system call is among them.
const FRAMES: usize = 40;
/// Between two looks, so that who stands still is told from who is slow.
const APART: Duration = Duration::from_secs(2);

/// Two looks at who is busy, and where in the kernel. Never fails: what cannot be had is told instead.
#[must_use]
pub fn explain(outpatch: &Outpatch) -> String {
    let first = look(outpatch);
    thread::sleep(APART);
    let second = look(outpatch);
    format!("its tasks:\n{first}and {APART:?} later:\n{second}")
}

/// A line for each place that somebody is at, with all who are there.
fn look(outpatch: &Outpatch) -> String {
    let stacks = match outpatch.json(&["stack"]) {
        Ok(Value::Array(stacks)) => stacks,
        Ok(other) => return format!("no stacks: {other}\n"),
        Err(error) => return format!("no stacks: {error:#}\n"),
    };
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    for stack in stacks.iter().filter(|stack| is_busy(&stack["task"])) {
        let task = &stack["task"];
        let symbols = stack["frames"].as_array().into_iter().flatten();
        let symbols: Vec<&str> = symbols
            .filter_map(|frame| frame["symbol"].as_str())
            .take(FRAMES)
            .collect();
        let who = places.entry(symbols.join(" ")).or_default();
        // Writing to a string does not fail.
        let _ = write!(
            who,
            " {} {} {} vCPU {},",
            task["pid"], task["comm"], task["state"], task["vcpu"]
        );
    }
    places
        .iter()
        .map(|(place, who)| format!("  at {place}:{who}\n"))
        .collect()
}

fn is_busy(task: &Value) -> bool {
    let one_of = |words: &[&str], field: &str| {
        let word = task[field].as_str();
        word.is_some_and(|word| words.contains(&word))
    };
    // Who is on a vCPU can hold a lock whatever its state, idle tasks too.
    let runs = !task["vcpu"].is_null();
    runs || (one_of(&BUSY, "state") && task["pid"] != 0) || one_of(&OF_THE_SHELL, "comm")
}
