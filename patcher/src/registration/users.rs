//! What else in the guest uses a patch's code: while something does, the code cannot be freed.
//!
//! Perf and BPF hold references to a module (`module.refcnt`). A kprobe holds one only while it is
//! being registered (`kernel/kprobes.c: register_kprobe`). After that the kernel finds it in
//! `kprobe_table` when a module goes, and disarms it, which nothing does for a patch. A probe that was removed may still change the
//! code once more, when its optimization is undone; until then the code is not what was written.
//! The table changes by single pointers, so that it can be read at any moment.

use introspect::{Field, Gva, GvaRange, Kernel, KernelMemory};

use crate::error::{PatchError, StepError, unexpected};
use crate::registration::module_struct::UNUSED;

/// The most buckets of `kprobe_table`; kernels have 64.
const MAX_BUCKETS: u64 = 4096;
/// Bytes of a bucket, which is a pointer.
const POINTER: u64 = 8;
/// The most kprobes: one for each function of a large kernel.
const MAX_KPROBES: usize = 1 << 18;

/// Something that uses a patch's code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeUser {
    /// Something has a reference to its `struct module`.
    #[error("its reference count is {count}, {UNUSED} without other users")]
    Reference {
        /// The count.
        count: u32,
    },
    /// There is a kprobe in it.
    #[error("a kprobe is at {0}")]
    Kprobe(Gva),
    /// It is not what was written.
    #[error("the guest has changed it at {0}")]
    Changed(Gva),
}

/// `kprobe_table`.
#[derive(Clone, Copy, Debug)]
pub struct KprobeTable {
    pub(super) table: GvaRange,
    pub(super) next: Field,
    pub(super) link: Field,
    pub(super) addr: Field,
}

impl KprobeTable {
    /// That of `kernel`; `None` if it has no kprobes.
    ///
    /// # Errors
    /// [`PatchError::Guest`] if its types lack something.
    pub fn new(kernel: &Kernel) -> Result<Option<KprobeTable>, PatchError> {
        let Ok(start) = kernel.symbols.address("kprobe_table") else {
            return Ok(None);
        };
        let size = kernel.symbols.size(start).unwrap_or_default();
        Ok(Some(KprobeTable {
            table: GvaRange::new(start, start.add(size.min(MAX_BUCKETS * POINTER))),
            next: kernel.btf.field("hlist_node.next")?,
            link: kernel.btf.field("kprobe.hlist")?,
            addr: kernel.btf.field("kprobe.addr")?,
        }))
    }

    /// The address of a kprobe in `code`, if there is one.
    ///
    /// # Errors
    /// [`StepError::Failed`] if the table cannot be read.
    pub fn find(
        &self,
        memory: &KernelMemory<'_>,
        code: GvaRange,
    ) -> Result<Option<Gva>, StepError> {
        let mut left = MAX_KPROBES;
        for bucket in 0..self.table.len() / POINTER {
            let mut link = memory.pointer(self.table.start.add(bucket * POINTER))?;
            while !link.is_null() {
                left = left.checked_sub(1).ok_or_else(|| {
                    StepError::Failed(unexpected("the guest's kprobe_table does not end"))
                })?;
                let probe = self.link.container(link);
                let addr = memory.pointer(self.addr.of(probe))?;
                if code.contains(addr) {
                    return Ok(Some(addr));
                }
                link = memory.pointer(self.next.of(link))?;
            }
        }
        Ok(None)
    }
}

/// The first address at which the guest's memory from `start` on is not `expected`.
///
/// # Errors
/// [`StepError::Failed`] if it cannot be read.
pub fn first_change(
    memory: &KernelMemory<'_>,
    start: Gva,
    expected: &[u8],
) -> Result<Option<Gva>, StepError> {
    let found = memory.bytes(start, expected.len() as u64, expected.len())?;
    let mut pairs = (0u64..).zip(found.iter().zip(expected));
    let changed = pairs.find(|(_, (found, expected))| found != expected);
    Ok(changed.map(|(offset, _)| start.add(offset)))
}
