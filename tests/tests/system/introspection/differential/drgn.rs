//! drgn as a process that lists the tasks of one core file after the other.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail, ensure};
use guests::external::drgn::Drgn;
use serde::Deserialize;

/// The script that drgn runs, below the crate's folder. Python searches the script's folder for
/// modules first, so no script there may be named `drgn.py`.
const SCRIPT: &str = "tests/system/introspection/differential/list_tasks.py";

/// A task as drgn reads it.
#[derive(Debug, Deserialize)]
pub struct DrgnTask {
    pub pid: i32,
    pub comm: String,
    /// Whether the task is in the kernel's lists, or an idle task.
    pub listed: bool,
    /// The addresses on its kernel stack, innermost first.
    pub frames: Option<Vec<u64>>,
    /// How many return addresses on it a tracer had replaced.
    pub recovered: u64,
    /// Why drgn has no frames.
    pub why: Option<String>,
}

/// A line that the script prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Tasks(BTreeMap<String, DrgnTask>),
    Error(String),
}

/// The process.
#[derive(Debug)]
pub struct DrgnProcess {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl DrgnProcess {
    /// Starts the process, with the debugging information of the guest's kernel.
    pub fn start(drgn: &Drgn, vmlinux: &Path) -> Result<DrgnProcess> {
        let mut child = drgn
            .command(&Path::new(env!("CARGO_MANIFEST_DIR")).join(SCRIPT))
            .arg(vmlinux)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start python3")?;
        let requests = child.stdin.take().context("no pipe to drgn")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from drgn")?);
        Ok(DrgnProcess {
            child,
            requests,
            answers,
        })
    }

    /// All tasks in a core file, by the address of their `task_struct`.
    pub fn tasks(&mut self, core: &Path) -> Result<BTreeMap<u64, DrgnTask>> {
        writeln!(self.requests, "{}", core.display())?;
        let mut line = String::new();
        let read = self.answers.read_line(&mut line)?;
        ensure!(read > 0, "drgn ended");
        match serde_json::from_str(&line).context("drgn's answer")? {
            Answer::Error(error) => bail!("drgn on {}: {error}", core.display()),
            Answer::Tasks(tasks) => tasks
                .into_iter()
                .map(|(address, task)| Ok((address.parse()?, task)))
                .collect(),
        }
    }
}

impl Drop for DrgnProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
