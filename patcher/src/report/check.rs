//! The report of a dry run: what applying a patch would do to the guest.

use serde::{Deserialize, Serialize};

use crate::report::pause::PauseReport;
use crate::report::task::TaskReport;

/// A function of the guest that a patch would replace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundFunction {
    /// The object that has the function: `vmlinux`, or the name of a module.
    pub object: String,
    /// The function's name.
    pub name: String,
    /// Which symbol of that name it is, as in [`FunctionReport::sympos`].
    ///
    /// [`FunctionReport::sympos`]: crate::FunctionReport::sympos
    pub sympos: u64,
    /// The address of its first byte, as `0x` and 16 hexadecimal digits.
    pub address: String,
    /// Its size in bytes, as kallsyms counts it: without parts that lie elsewhere (`.cold`).
    pub size: u64,
}

/// A symbol of the guest that a patch refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundSymbol {
    /// The symbol's name.
    pub name: String,
    /// The address that it resolves to, as `0x` and 16 hexadecimal digits: all zeroes for a weak
    /// symbol that the guest does not have.
    pub address: String,
}

/// Guest memory that a part of a patch would get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocationReport {
    /// The address of its first byte, as `0x` and 16 hexadecimal digits.
    pub address: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What applying a patch would have done, had it been applied at the moment of the check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The name of the livepatch module.
    pub name: String,
    /// The functions that the patch would replace.
    pub functions: Vec<FoundFunction>,
    /// The symbols of the guest that the patch refers to.
    pub symbols: Vec<FoundSymbol>,
    /// Where its code would be.
    pub code: AllocationReport,
    /// Where its constants would be.
    pub rodata: AllocationReport,
    /// Where its writable data would be.
    pub data: AllocationReport,
    /// Every task, with how it would switch or what blocks it; tasks that are blocked come first.
    pub tasks: Vec<TaskReport>,
    /// No task blocked: all would have switched in one pause.
    pub at_once: bool,
    /// The pauses that the check itself took.
    pub pauses: PauseReport,
}
