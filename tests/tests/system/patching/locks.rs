//! A guest that was stopped while it held a lock: who reads what the lock protects says so, and who would change it does not.
//!
//! A guest cannot be made to stop in there, so its memory is read through a pane on which the lock's word is written over, with what the
//! kernel's own code writes there.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use introspect::modules::proc_kallsyms;
use introspect::{
    CoreFile, Gva, Kernel, OutOfBounds, PhysMemory, TasksError, Unwinder, modules, task_list,
};
use patcher::{PatchError, Patcher, ReadOnlyMachine};
use vm_memory::GuestAddress;

/// `kernel/locking/qrwlock.c`: a writer has `_QW_LOCKED` in the low byte, each reader adds `_QR_BIAS`.
const QUEUED: (u32, u32) = (0x0ff, 0x200);
/// `kernel/locking/rwbase_rt.c`: a writer has `WRITER_BIAS`, each reader adds one to `READER_BIAS`.
const RT: (u32, u32) = (1 << 30, (1 << 31) + 1);

/// Memory with a few words written over.
struct Pane<'a> {
    core: &'a CoreFile,
    over: Vec<(GuestAddress, Vec<u8>)>,
}

impl PhysMemory for Pane<'_> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        self.core.read(gpa, buf)?;
        for (at, bytes) in &self.over {
            for (byte, here) in bytes.iter().zip(at.0..) {
                let offset = here
                    .checked_sub(gpa.0)
                    .and_then(|o| usize::try_from(o).ok());
                if let Some(place) = offset.and_then(|offset| buf.get_mut(offset)) {
                    *place = *byte;
                }
            }
        }
        Ok(())
    }
}

impl<'a> Pane<'a> {
    fn over(core: &'a CoreFile, kernel: &Kernel, at: Gva, bytes: &[u8]) -> Result<Pane<'a>> {
        let gpa = kernel.memory(core).translate(at)?.gpa;
        Ok(Pane {
            core,
            over: vec![(gpa, bytes.to_vec())],
        })
    }
}

/// The readers, on the guest in the core at `path`.
pub fn readers_say_busy(path: &Path) -> Result<()> {
    let core = CoreFile::open(path)?;
    let kernel = Kernel::find(&core, core.vcpus())?;
    let lock = kernel.symbols.address("tasklist_lock")?;
    let ((writer, reader), lock) = match kernel.banner.contains("PREEMPT_RT") {
        true => {
            let readers = ["rwbase_rt.readers", "rt_rw_lock.readers"];
            (RT, kernel.btf.first_field(&readers)?.of(lock))
        }
        // It begins with the word.
        false => (QUEUED, lock),
    };
    let plain = task_list::read(&kernel, &kernel.memory(&core), core.vcpus())?.len();

    let pane = Pane::over(&core, &kernel, lock, &writer.to_le_bytes())?;
    match task_list::read(&kernel, &kernel.memory(&pane), core.vcpus()) {
        Err(TasksError::Busy("tasklist_lock")) => {}
        other => bail!(
            "with tasklist_lock held for writing: {:?}",
            other.map(|tasks| tasks.len())
        ),
    }
    let pane = Pane::over(&core, &kernel, lock, &reader.to_le_bytes())?;
    let shared = task_list::read(&kernel, &kernel.memory(&pane), core.vcpus())?.len();
    ensure!(shared == plain, "with a reader {shared} tasks, not {plain}");

    // What depends on no lock reads the same while somebody changes the list: forwards it leads on at any moment.
    let memory = kernel.memory(&core);
    let listed = proc_kallsyms::modules_and_runtime(&kernel, &memory)?;
    let mutex = kernel.symbols.address("module_mutex")?;
    let owner = kernel.symbols.address("init_task")?;
    // A mutex begins with its owner, but for an rt_mutex.
    let word = kernel
        .btf
        .first_field(&["mutex.owner", "rt_mutex_base.owner", "rt_mutex.owner"])?;
    let pane = Pane::over(&core, &kernel, word.of(mutex), &owner.0.to_le_bytes())?;
    ensure!(
        kernel
            .layout
            .lock
            .mutex
            .is_held(&kernel.memory(&pane), mutex)?,
        "module_mutex is not seen held"
    );
    ensure!(
        proc_kallsyms::modules_and_runtime(&kernel, &kernel.memory(&pane))? == listed,
        "other symbols while module_mutex is held"
    );
    a_module_taken_apart_is_left_out(&core, &kernel)
}

/// `free_module` says `MODULE_STATE_UNFORMED` before it takes anything apart: then the module is on no list of ours, and stacks know
/// nothing of it.
fn a_module_taken_apart_is_left_out(core: &CoreFile, kernel: &Kernel) -> Result<()> {
    const UNFORMED: u32 = 3;
    let loaded = modules::list(kernel, &kernel.memory(core))?;
    let module = loaded.first().context("a guest with modules")?;
    let state = kernel.btf.field("module.state")?.of(module.addr);
    let pane = Pane::over(core, kernel, state, &UNFORMED.to_le_bytes())?;
    let memory = kernel.memory(&pane);
    let left = modules::list(kernel, &memory)?;
    ensure!(
        left.len() + 1 == loaded.len() && left.iter().all(|m| m.addr != module.addr),
        "{} of {} modules",
        left.len(),
        loaded.len()
    );
    let mut unwinder = Unwinder::new(kernel, &memory)?;
    unwinder.refresh(kernel, &memory)?;
    Ok(())
}

/// What applying `module` would come to in the guest in the core at `path`, with each lock held that protects what is changed.
pub fn changes_say_busy(path: &Path, module: &[u8]) -> Result<()> {
    let core = CoreFile::open(path)?;
    let kernel = Kernel::find(&core, core.vcpus())?;
    let plain = Pane {
        core: &core,
        over: Vec::new(),
    };
    check(plain, module)?;
    let owner = kernel.symbols.address("init_task")?.0.to_le_bytes();
    for lock in ["klp_mutex", "text_mutex", "ftrace_lock"] {
        let at = kernel.symbols.address(lock)?;
        busy(Pane::over(&core, &kernel, at, &owner)?, module, lock)?;
    }
    let lock = kernel.symbols.address("tasklist_lock")?;
    let pane = Pane::over(&core, &kernel, lock, &QUEUED.0.to_le_bytes())?;
    busy(pane, module, "tasklist_lock")?;
    // What says that text is being changed: where there is no bp_desc, the array itself.
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
    let pane = Pane::over(&core, &kernel, poked, &1u32.to_le_bytes())?;
    busy(pane, module, "changing its own text")
}

fn check(pane: Pane<'_>, module: &[u8]) -> Result<(), PatchError> {
    let vcpus = pane.core.vcpus().to_vec();
    let mut machine = ReadOnlyMachine::new(pane, vcpus);
    Patcher::new().check(&mut machine, module).map(drop)
}

fn busy(pane: Pane<'_>, module: &[u8], what: &str) -> Result<()> {
    match check(pane, module) {
        Err(PatchError::Busy { what: said, .. }) if said.contains(what) => Ok(()),
        other => bail!("with {what}: {other:?}"),
    }
}
