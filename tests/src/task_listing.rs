//! A guest's own listing of its threads and their kernel stacks, and the stacks that outpatch
//! prints in the same form.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A shell command that prints `T PID COMM` for every thread, followed by the lines of its stack
/// unless it is the shell itself.
pub const COMMAND: &str = "for t in /proc/[0-9]*/task/[0-9]*; do p=${t##*/}; \
    [ -e $t/comm ] || continue; echo \"T $p $(cat $t/comm)\"; [ $p = $$ ] || cat $t/stack; done";

/// The frames in the text of `/proc/PID/stack`.
#[must_use]
pub fn guest_frames(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("[<0>] "));
    lines.map(|frame| frame.trim().to_owned()).collect()
}

/// `TASK_COMM_LEN` without the NUL.
const COMM_LEN: usize = 15;

/// Whether `/proc` shows `comm` as `shown`: it adds the work of a worker
/// (`kernel/workqueue.c: wq_worker_comm`), and shows the name of a kernel thread in full
/// (`fs/proc/array.c: proc_task_name`).
#[must_use]
pub fn is_named(comm: &str, shown: &str) -> bool {
    match shown.strip_prefix(comm) {
        Some("") => true,
        Some(more) => {
            comm.len() == COMM_LEN || comm.starts_with("kworker/") && more.starts_with(['-', '+'])
        }
        None => false,
    }
}

/// Each thread's name and its frames, innermost first, by thread ID.
pub type Stacks = BTreeMap<i64, (String, Vec<String>)>;

/// Parses what [`COMMAND`] printed.
///
/// # Errors
/// When the text has another form.
pub fn parse(listing: &str) -> Result<Stacks> {
    let mut stacks = Stacks::new();
    let mut current = None;
    for line in listing.lines() {
        if let Some(rest) = line.strip_prefix("T ") {
            let (pid, comm) = rest.split_once(' ').context("a thread with no name")?;
            let pid = pid.parse()?;
            stacks.insert(pid, (comm.to_owned(), Vec::new()));
            current = Some(pid);
        } else if let (Some(frame), Some(pid)) = (line.strip_prefix("[<0>] "), current) {
            if let Some((_, frames)) = stacks.get_mut(&pid) {
                frames.push(frame.trim().to_owned());
            }
        } else if !line.trim().is_empty() {
            bail!("a line that is not a frame: {line:?}");
        }
    }
    Ok(stacks)
}

/// The frames that outpatch prints as JSON, as the guest prints them: without the scheduler's own,
/// which `stack_trace_save_tsk` leaves out.
///
/// # Errors
/// When a frame has no symbol.
pub fn symbols(stack: &Value) -> Result<Vec<String>> {
    let frames = stack["frames"]
        .as_array()
        .context("a stack with no frames")?;
    let leading = frames
        .iter()
        .take_while(|frame| frame["scheduler"] == true)
        .count();
    frames[leading..]
        .iter()
        .map(|frame| {
            Ok(frame["symbol"]
                .as_str()
                .context("a frame with no symbol")?
                .to_owned())
        })
        .collect()
}
