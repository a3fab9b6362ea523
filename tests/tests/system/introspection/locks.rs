//! Readers of a guest that was stopped while a task in it held a lock: a reader of what the lock
//! protects reports that it is busy, and a reader that needs no lock reads the same as before.
//!
//! A guest cannot be made to stop with a lock held, so its memory is read through an overlay that
//! replaces the lock's word by what the kernel's own code writes there.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use introspect::{
    CoreFile, Gva, Kernel, OutOfBounds, PhysMemory, TaskCache, TasksError, Unwinder, modules,
    task_list,
};
use vm_memory::GuestAddress;

/// The word of a lock with a writer, and with a reader.
#[derive(Clone, Copy)]
pub struct RwLockWords {
    pub writer: u32,
    reader: u32,
}

/// `kernel/locking/qrwlock.c`: a writer has `_QW_LOCKED` in the low byte, each reader adds
/// `_QR_BIAS`.
pub const QUEUED: RwLockWords = RwLockWords {
    writer: 0x0ff,
    reader: 0x200,
};
/// `kernel/locking/rwbase_rt.c`: a writer has `WRITER_BIAS`, each reader adds one to `READER_BIAS`.
const RT: RwLockWords = RwLockWords {
    writer: 1 << 30,
    reader: (1 << 31) + 1,
};

/// The memory of a core file with some bytes replaced.
pub struct Overlay<'a> {
    pub core: &'a CoreFile,
    replaced: Option<(GuestAddress, Vec<u8>)>,
}

impl PhysMemory for Overlay<'_> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        self.core.read(gpa, buf)?;
        if let Some((at, bytes)) = &self.replaced {
            for (byte, address) in bytes.iter().zip(at.0..) {
                let offset = address
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

impl<'a> Overlay<'a> {
    /// The memory as it is in the core file.
    pub fn empty(core: &'a CoreFile) -> Overlay<'a> {
        let replaced = None;
        Overlay { core, replaced }
    }

    /// The memory with `bytes` at the virtual address `at`.
    pub fn new(core: &'a CoreFile, kernel: &Kernel, at: Gva, bytes: &[u8]) -> Result<Overlay<'a>> {
        let gpa = kernel.memory(core).translate(at)?.gpa;
        let replaced = Some((gpa, bytes.to_vec()));
        Ok(Overlay { core, replaced })
    }
}

/// Checks the readers, on the guest in the core file at `path`.
pub fn readers_report_busy(path: &Path) -> Result<()> {
    let core = CoreFile::open(path)?;
    let kernel = Kernel::find(&core, core.vcpus())?;
    let lock = kernel.symbols.address("tasklist_lock")?;
    let (words, lock) = match kernel.banner.contains("PREEMPT_RT") {
        true => {
            let readers = ["rwbase_rt.readers", "rt_rw_lock.readers"];
            (RT, kernel.btf.first_field(&readers)?.of(lock))
        }
        // The word is at the start of the lock.
        false => (QUEUED, lock),
    };
    let plain = task_list::read(&kernel, &kernel.memory(&core), core.vcpus())?.len();

    let overlay = Overlay::new(&core, &kernel, lock, &words.writer.to_le_bytes())?;
    match task_list::read(&kernel, &kernel.memory(&overlay), core.vcpus()) {
        Err(TasksError::Busy("tasklist_lock")) => {}
        other => bail!(
            "with tasklist_lock held for writing: {:?}",
            other.map(|tasks| tasks.len())
        ),
    }
    // In a guest that cannot go on, the lists are read all the same.
    let memory = kernel.memory(&overlay);
    let (cache, doubts) = TaskCache::read_in_mid_change(&kernel, &memory, core.vcpus())?;
    ensure!(
        matches!(doubts.as_slice(), [TasksError::Busy("tasklist_lock")]),
        "{doubts:?}"
    );
    let as_is = cache.tasks().len();
    ensure!(as_is == plain, "in mid-change {as_is} tasks, not {plain}");
    let overlay = Overlay::new(&core, &kernel, lock, &words.reader.to_le_bytes())?;
    let shared = task_list::read(&kernel, &kernel.memory(&overlay), core.vcpus())?.len();
    ensure!(shared == plain, "with a reader {shared} tasks, not {plain}");

    // What depends on no lock reads the same while the list is being changed: following its `next`
    // pointers is possible at any moment.
    let memory = kernel.memory(&core);
    let listed = modules::modules_and_runtime(&kernel, &memory)?;
    let mutex = kernel.symbols.address("module_mutex")?;
    let owner = kernel.symbols.address("init_task")?;
    // The owner is at the start of a mutex, but not of an rt_mutex.
    let word = kernel
        .btf
        .first_field(&["mutex.owner", "rt_mutex_base.owner", "rt_mutex.owner"])?;
    let overlay = Overlay::new(&core, &kernel, word.of(mutex), &owner.0.to_le_bytes())?;
    ensure!(
        kernel
            .layout
            .lock
            .mutex
            .is_held(&kernel.memory(&overlay), mutex)?,
        "module_mutex is not recognised as held"
    );
    ensure!(
        modules::modules_and_runtime(&kernel, &kernel.memory(&overlay))? == listed,
        "other symbols while module_mutex is held"
    );
    an_unformed_module_is_left_out(&core, &kernel)
}

/// `free_module` sets `MODULE_STATE_UNFORMED` before it takes anything apart: from then on the
/// module is in no list of introspect's, and stacks are unwound without it.
fn an_unformed_module_is_left_out(core: &CoreFile, kernel: &Kernel) -> Result<()> {
    const UNFORMED: u32 = 3;
    let loaded = modules::list(kernel, &kernel.memory(core))?;
    let module = loaded.first().context("a guest with modules")?;
    let state = kernel.btf.field("module.state")?.of(module.addr);
    let overlay = Overlay::new(core, kernel, state, &UNFORMED.to_le_bytes())?;
    let memory = kernel.memory(&overlay);
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
