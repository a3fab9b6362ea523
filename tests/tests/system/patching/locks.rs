//! A dry run on a guest that was stopped while a task in it held a lock: where the lock protects
//! what a patch changes, the guest is reported as busy.

use std::path::Path;

use anyhow::{Result, bail};
use introspect::{CoreFile, Kernel};
use patcher::{PatchError, Patcher, ReadOnlyMachine};

use crate::introspection::locks::{Overlay, QUEUED};

/// Checks a dry run of applying `module` in the guest in the core file at `path`, with each lock
/// held that protects what a patch changes.
pub fn changes_report_busy(path: &Path, module: &[u8]) -> Result<()> {
    let core = CoreFile::open(path)?;
    let kernel = Kernel::find(&core, core.vcpus())?;
    check(Overlay::empty(&core), module)?;
    let owner = kernel.symbols.address("init_task")?.0.to_le_bytes();
    for lock in ["klp_mutex", "text_mutex", "ftrace_lock"] {
        let at = kernel.symbols.address(lock)?;
        let overlay = Overlay::new(&core, &kernel, at, &owner)?;
        expect_busy(overlay, module, lock)?;
    }
    let lock = kernel.symbols.address("tasklist_lock")?;
    let overlay = Overlay::new(&core, &kernel, lock, &QUEUED.writer.to_le_bytes())?;
    expect_busy(overlay, module, "tasklist_lock")?;
    // The kernel's mark that it is changing text: in kernels without bp_desc, in the array itself.
    let poked = match kernel.symbols.address("text_poke_array") {
        Ok(array) => kernel
            .btf
            .field("smp_text_poke_array.nr_entries")?
            .of(array),
        Err(_) => {
            let batch = kernel.symbols.address("bp_desc")?;
            kernel.btf.field("bp_patching_desc.refs")?.of(batch)
        }
    };
    let overlay = Overlay::new(&core, &kernel, poked, &1u32.to_le_bytes())?;
    expect_busy(overlay, module, "changing its own text")
}

fn check(overlay: Overlay<'_>, module: &[u8]) -> Result<(), PatchError> {
    let vcpus = overlay.core.vcpus().to_vec();
    let mut machine = ReadOnlyMachine::new(overlay, vcpus);
    Patcher::new().check(&mut machine, module).map(drop)
}

fn expect_busy(overlay: Overlay<'_>, module: &[u8], reason: &str) -> Result<()> {
    match check(overlay, module) {
        Err(PatchError::Busy { what, .. }) if what.contains(reason) => Ok(()),
        other => bail!("with {reason}: {other:?}"),
    }
}
