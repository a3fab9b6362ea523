//! A real guest to corrupt in place of the synthetic one: the core file that `OUTPATCH_FUZZ_CORE`
//! names.
//!
//! The addresses that introspection reads of the undamaged guest are recorded once; only these are
//! damaged, so that each record of the fuzzer's bytes matters. A record has sixteen bytes: which
//! address, the offset from there, how the value is meant, and the value.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use introspect::{CoreFile, Kernel, OutOfBounds, PhysMemory, Unwinder};
use vm_memory::GuestAddress;

use super::mutate::{MAX_CHANGES, Mutated};
use super::{stacks, stacks_of, walk};

const RECORD: usize = 16;

/// The guest, and which of its memory is read.
pub struct Dump {
    core: CoreFile,
    kernel: Kernel,
    unwinder: Unwinder,
    /// Start and length of each read.
    reads: Vec<(usize, usize)>,
    /// The index in `reads` of the first read after finding the kernel, and of the first after
    /// reading the unwind data.
    after_kernel: usize,
    after_unwinder: usize,
}

/// The guest that the environment names.
///
/// # Panics
/// If it cannot be used: fuzzing another guest than the requested one would be misleading.
pub fn named() -> Option<&'static Dump> {
    static DUMP: OnceLock<Option<Dump>> = OnceLock::new();
    let open = || {
        let path = std::env::var_os("OUTPATCH_FUZZ_CORE")?;
        Some(Dump::open(Path::new(&path)))
    };
    DUMP.get_or_init(open).as_ref()
}

/// Memory that records what is read of it.
struct Traced<'c> {
    core: &'c CoreFile,
    reads: Mutex<BTreeMap<usize, usize>>,
}

impl PhysMemory for Traced<'_> {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        self.core.read(gpa, buf)?;
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let len = reads.entry(gpa.0 as usize).or_default();
        *len = (*len).max(buf.len());
        Ok(())
    }
}

impl Traced<'_> {
    fn take(&self) -> Vec<(usize, usize)> {
        std::mem::take(&mut *self.reads.lock().unwrap_or_else(PoisonError::into_inner))
            .into_iter()
            .collect()
    }
}

impl Dump {
    fn open(path: &Path) -> Dump {
        let core = CoreFile::open(path).expect("OUTPATCH_FUZZ_CORE names a core file");
        let traced = Traced {
            core: &core,
            reads: Mutex::default(),
        };
        let kernel = Kernel::find(&traced, core.vcpus()).expect("a guest with a kernel");
        let mut reads = traced.take();
        let after_kernel = reads.len();
        let unwinder = Unwinder::new(&kernel, &kernel.memory(&traced)).expect("unwind data");
        reads.extend(traced.take());
        let after_unwinder = reads.len();
        let reliable = walk(&kernel, unwinder.clone(), &traced, core.vcpus());
        assert!(reliable > 0, "a guest with stacks that can be walked");
        reads.extend(traced.take());
        Dump {
            core,
            kernel,
            unwinder,
            reads,
            after_kernel,
            after_unwinder,
        }
    }

    /// Runs introspection on the damaged guest. The first byte says how much of it is found again;
    /// most often not the kernel, which takes long and gives the same for all damage to what is
    /// read later.
    pub fn damaged(&self, data: &[u8]) -> usize {
        let Some((how, records)) = data.split_first() else {
            return stacks(&self.core, self.core.vcpus());
        };
        let from = match how & 15 {
            15 => 0,
            13 | 14 => self.after_kernel,
            _ => self.after_unwinder,
        };
        let reads = &self.reads[from..];
        let mut memory = Mutated::of(&self.core);
        for record in records.as_chunks::<RECORD>().0.iter().take(MAX_CHANGES) {
            self.change(&mut memory, reads, record);
        }
        let vcpus = self.core.vcpus();
        match from {
            0 => stacks(&memory, vcpus),
            from if from == self.after_kernel => stacks_of(&self.kernel, &memory, vcpus),
            _ => walk(&self.kernel, self.unwinder.clone(), &memory, vcpus),
        }
    }

    fn change(
        &self,
        memory: &mut Mutated<'_, CoreFile>,
        reads: &[(usize, usize)],
        record: &[u8; RECORD],
    ) {
        let [a, b, c, d, low, high, mode, _, value @ ..] = *record;
        let read = |n: u32| reads.get(n as usize % reads.len().max(1)).copied();
        let Some((start, len)) = read(u32::from_le_bytes([a, b, c, d])) else {
            return;
        };
        let offset = usize::from(u16::from_le_bytes([low, high]));
        let offset = offset * len.div_ceil(1 << 16) % len.max(1);
        let value = u64::from_le_bytes(value);
        let value = match mode & 3 {
            0 => value,
            // The word at another address: a pointer of the guest's own, or one next to its target.
            1 | 2 => {
                let mut word = [0; 8];
                let (from, _) = read(value as u32).unwrap_or_default();
                let _ = self.core.read(GuestAddress(from as u64), &mut word);
                let distance = if mode & 3 == 1 { 0 } else { value >> 48 };
                u64::from_le_bytes(word).wrapping_add(distance)
            }
            // An entry of a page table, or the physical address of another read.
            _ => read(value as u32).unwrap_or_default().0 as u64 & !0xfff | value >> 52,
        };
        let width = 1 << (3 - (mode >> 2 & 3));
        memory.set(start + offset, &value.to_le_bytes()[..width]);
    }
}
