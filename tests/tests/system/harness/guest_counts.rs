//! Counts of guests that were booted and lost, over all scenarios of a run.
//!
//! Scenarios count in their beds, in a file of the scratch folder; the host adds the files up.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

/// The file in a scratch folder, with a line for each event.
const FILE: &str = "guests";

/// Something that is counted.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A guest was started.
    Boot,
    /// A guest was lost, for whatever reason.
    Lost,
}

impl Event {
    fn word(self) -> &'static str {
        match self {
            Event::Boot => "boot",
            Event::Lost => "lost",
        }
    }
}

/// In the bed: counts an event in the scratch folder.
pub fn count(scratch: &Path, event: Event) -> Result<()> {
    let path = scratch.join(FILE);
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)?;
    writeln!(file, "{}", event.word()).with_context(|| path.display().to_string())
}

/// On the host: the counts of all scenarios so far.
#[derive(Debug, Default)]
pub struct GuestCounts {
    boots: AtomicU64,
    lost: AtomicU64,
}

impl GuestCounts {
    /// Adds what a scenario counted in its scratch folder.
    pub fn add(&self, scratch: &Path) {
        let text = fs::read_to_string(scratch.join(FILE)).unwrap_or_default();
        let count = |event: Event| {
            let lines = text.lines().filter(|line| *line == event.word());
            lines.count() as u64
        };
        self.boots.fetch_add(count(Event::Boot), Ordering::Relaxed);
        self.lost.fetch_add(count(Event::Lost), Ordering::Relaxed);
    }

    /// How many guests were started.
    pub fn boots(&self) -> u64 {
        self.boots.load(Ordering::Relaxed)
    }

    /// How many guests were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
