//! drgn as a process that answers for one core file after the other.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use guests::external::drgn::Drgn;
use serde::Deserialize;

/// What drgn says of a task.
#[derive(Debug, Deserialize)]
pub struct Told {
    pub pid: i32,
    pub comm: String,
    /// It is in the kernel's lists, or an idle task.
    pub listed: bool,
    /// Addresses of its kernel stack, innermost first.
    pub frames: Option<Vec<u64>>,
    /// Why there are none.
    pub why: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Tasks(BTreeMap<String, Told>),
    Error(String),
}

/// The process.
#[derive(Debug)]
pub struct Oracle {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oracle {
    /// Starts it, with the debugging information of the guest's kernel.
    pub fn start(drgn: &Drgn, vmlinux: &Path) -> Result<Oracle> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/system/introspection/differential/drgn.py");
        let mut child = drgn
            .command(&script)
            .arg(vmlinux)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start python3")?;
        let questions = child.stdin.take().context("no pipe to drgn")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from drgn")?);
        Ok(Oracle {
            child,
            questions,
            answers,
        })
    }

    /// All tasks in a core, by the address of their `task_struct`.
    pub fn tasks(&mut self, core: &Path) -> Result<BTreeMap<u64, Told>> {
        writeln!(self.questions, "{}", core.display())?;
        let mut line = String::new();
        let read = self.answers.read_line(&mut line)?;
        ensure!(read > 0, "drgn ended");
        match serde_json::from_str(&line).context("drgn's answer")? {
            Answer::Error(error) => bail!("drgn on {}: {error}", core.display()),
            Answer::Tasks(tasks) => tasks
                .into_iter()
                .map(|(address, told)| Ok((address.parse()?, told)))
                .collect(),
        }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
