//! A real guest to damage, in place of the one made here: the core file that `OUTPATCH_FUZZ_CORE` names.
//!
//! What introspection reads of the guest while it is whole is noted once; damage goes to such places alone, so each record of a
//! fuzzer's bytes counts. A record has sixteen bytes: which of the places, where in it, how the value is meant, and the value.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use introspect::{CoreFile, Kernel, OutOfBounds, PhysMemory, Unwinder};
use vm_memory::GuestAddress;

use super::mutate::{MAX_CHANGES, Mutated};
use super::{stacks, stacks_of, walk};

const RECORD: usize = 16;

/// The guest, and what is read of it.
pub struct Dump {
    core: CoreFile,
    kernel: Kernel,
    unwinder: Unwinder,
    /// Of each read, where and how much.
    places: Vec<(usize, usize)>,
    /// From where on of them the kernel has been found, and from where on its unwind data are known.
    found: usize,
    known: usize,
}

/// The guest that the environment names.
///
/// # Panics
/// If it names one that cannot be used: fuzzing another than the one that was asked for would say nothing.
pub fn named() -> Option<&'static Dump> {
    static DUMP: OnceLock<Option<Dump>> = OnceLock::new();
    let open = || {
        let path = std::env::var_os("OUTPATCH_FUZZ_CORE")?;
        Some(Dump::open(Path::new(&path)))
    };
    DUMP.get_or_init(open).as_ref()
}

/// Memory that notes what is read of it.
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
        let mut places = traced.take();
        let found = places.len();
        let unwinder = Unwinder::new(&kernel, &kernel.memory(&traced)).expect("unwind data");
        places.extend(traced.take());
        let known = places.len();
        let reliable = walk(&kernel, unwinder.clone(), &traced, core.vcpus());
        assert!(reliable > 0, "a guest with stacks that can be walked");
        places.extend(traced.take());
        Dump {
            core,
            kernel,
            unwinder,
            places,
            found,
            known,
        }
    }

    /// The guest with damage; the first byte says what of it is found anew. Most often not the kernel: that takes long, and is
    /// the same for all damage to what comes later.
    pub fn damaged(&self, data: &[u8]) -> usize {
        let Some((how, records)) = data.split_first() else {
            return stacks(&self.core, self.core.vcpus());
        };
        let from = match how & 15 {
            15 => 0,
            13 | 14 => self.found,
            _ => self.known,
        };
        let places = &self.places[from..];
        let mut memory = Mutated::of(&self.core);
        for record in records.as_chunks::<RECORD>().0.iter().take(MAX_CHANGES) {
            self.change(&mut memory, places, record);
        }
        let vcpus = self.core.vcpus();
        match from {
            0 => stacks(&memory, vcpus),
            from if from == self.found => stacks_of(&self.kernel, &memory, vcpus),
            _ => walk(&self.kernel, self.unwinder.clone(), &memory, vcpus),
        }
    }

    fn change(
        &self,
        memory: &mut Mutated<'_, CoreFile>,
        places: &[(usize, usize)],
        record: &[u8; RECORD],
    ) {
        let [a, b, c, d, low, high, mode, _, value @ ..] = *record;
        let place = |n: u32| places.get(n as usize % places.len().max(1)).copied();
        let Some((start, len)) = place(u32::from_le_bytes([a, b, c, d])) else {
            return;
        };
        let offset = usize::from(u16::from_le_bytes([low, high]));
        let offset = offset * len.div_ceil(1 << 16) % len.max(1);
        let value = u64::from_le_bytes(value);
        let value = match mode & 3 {
            0 => value,
            // What stands elsewhere: a pointer of the guest's own, or one beside where it leads.
            1 | 2 => {
                let mut word = [0; 8];
                let (from, _) = place(value as u32).unwrap_or_default();
                let _ = self.core.read(GuestAddress(from as u64), &mut word);
                let beside = if mode & 3 == 1 { 0 } else { value >> 48 };
                u64::from_le_bytes(word).wrapping_add(beside)
            }
            // An entry of a page table, or where another place is in physical memory.
            _ => place(value as u32).unwrap_or_default().0 as u64 & !0xfff | value >> 52,
        };
        let width = 1 << (3 - (mode >> 2 & 3));
        memory.set(start + offset, &value.to_le_bytes()[..width]);
    }
}
