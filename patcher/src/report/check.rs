//! What a dry run of a patch found, as plain data.

use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;
use serde::{Deserialize, Serialize};

/// A function that a patch would replace, as the guest has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundFunction {
    /// `vmlinux` or the module's name.
    pub object: String,
    /// Its name.
    pub name: String,
    /// As in [`FunctionReport::sympos`].
    pub sympos: u64,
    /// Its first byte, as 0x and 16 hexadecimal digits.
    pub address: String,
    /// Its bytes, as kallsyms counts them; its parts elsewhere (`.cold`) not among them.
    pub size: u64,
}

/// A symbol of the guest that a patch uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundSymbol {
    /// Its name.
    pub name: String,
    /// What it comes to; all zeroes for a weak symbol that the guest has not.
    pub address: String,
}

/// Where a part of a patch would lie in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceReport {
    /// Its first byte.
    pub address: String,
    /// Its bytes.
    pub bytes: u64,
    /// Memory that the guest's memory map does not name; else the padding of the kernel's own text.
    pub hidden: bool,
}

/// What applying a patch would come to, had it been applied at that moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The patch module's name.
    pub name: String,
    /// The functions that it would replace.
    pub functions: Vec<FoundFunction>,
    /// What it uses of the guest, by name.
    pub symbols: Vec<FoundSymbol>,
    /// Its code.
    pub code: PieceReport,
    /// Its writable data, if it has any.
    pub data: Option<PieceReport>,
    /// Every task with the way in which it would switch, or what keeps it from that; those first.
    pub tasks: Vec<TaskReport>,
    /// Nobody was in the way: all would have switched in one pause.
    pub at_once: bool,
    /// What the check cost in pauses.
    pub pauses: PauseReport,
}
