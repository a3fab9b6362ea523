//! A set of guest writes that happens whole or not at all.
//!
//! Everything that one pause changes is first *planned*, while the guest's memory is only read, and then committed. The
//! commit keeps what was there before; when a write fails it puts that back, last write first. Within one pause nobody else
//! writes, so putting back is exact. What a later pause wants changed is a new plan: this module never undoes across a resume.
//!
//! Knows addresses and bytes only.

use std::ops::Range;

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, PhysMemory};
use vm_memory::GuestAddress;

use crate::error::PatchError;
use crate::machine::{Machine, MachineError};

/// Writes in their order. Their bytes lie one behind the other: a transition of many tasks has many small writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Writes {
    /// Where each goes, and where its bytes are.
    patch_memory: Vec<(GuestAddress, Range<usize>)>,
    bytes: Vec<u8>,
}

impl Writes {
    fn push(&mut self, gpa: GuestAddress, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.patch_memory.push((gpa, start..self.bytes.len()));
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = (GuestAddress, &[u8])> {
        let bytes = |place: &Range<usize>| self.bytes.get(place.clone()).unwrap_or_default();
        self.patch_memory
            .iter()
            .map(move |(gpa, place)| (*gpa, bytes(place)))
    }

    /// Takes back all but the first `len`.
    fn truncate(&mut self, len: usize) {
        if let Some((_, place)) = self.patch_memory.get(len) {
            self.bytes.truncate(place.start);
        }
        self.patch_memory.truncate(len);
    }
}

/// The writes of one pause, in the order in which they are to happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteBatch {
    writes: Writes,
}

impl WriteBatch {
    /// An empty plan.
    #[must_use]
    pub fn new() -> WriteBatch {
        WriteBatch::default()
    }

    /// Adds a write of `bytes` at `gpa` at the end.
    pub fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) {
        self.writes.push(gpa, bytes);
    }

    /// Adds a write at a kernel virtual address, past the guest's own protection of the page.
    ///
    /// # Errors
    /// [`ReadError`] when (part of) the range is not mapped; then nothing is added.
    pub fn write_kernel(
        &mut self,
        memory: &KernelMemory<'_>,
        gva: Gva,
        bytes: &[u8],
    ) -> Result<(), ReadError> {
        let before = self.writes.patch_memory.len();
        let (mut at, mut rest) = (gva, bytes);
        while !rest.is_empty() {
            let (gpa, left) = match memory.locate(at) {
                Ok(place) => place,
                Err(error) => {
                    self.writes.truncate(before);
                    return Err(error);
                }
            };
            let len = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(len);
            self.writes.push(gpa, now);
            at = at.add(left);
            rest = later;
        }
        Ok(())
    }

    /// How many writes there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.writes.patch_memory.len()
    }

    /// Carries the plan out. Only while `machine` is paused.
    ///
    /// # Errors
    /// [`PatchError::Machine`] with everything as before, or [`PatchError::Undo`] when putting back failed as well.
    pub fn commit<M: Machine>(&self, machine: &mut M) -> Result<UndoLog, PatchError> {
        let mut journal = UndoLog::default();
        let mut old = Vec::new();
        for (gpa, bytes) in self.writes.iter() {
            old.resize(bytes.len(), 0);
            let done = machine
                .memory()
                .read(gpa, &mut old)
                .map_err(|e| MachineError::Memory {
                    gpa: e.gpa,
                    len: e.len,
                })
                .and_then(|()| machine.write(gpa, bytes));
            if let Err(cause) = done {
                return Err(journal.undo(machine, cause.into()));
            }
            journal.before.push(gpa, &old);
        }
        Ok(journal)
    }
}

/// What stood where a plan was carried out. Good for the pause it was made in.
#[derive(Debug, Default)]
pub struct UndoLog {
    before: Writes,
}

impl UndoLog {
    /// Puts everything back, last first, because of `cause`, and returns what is to be said of it. Goes on past failures, so that
    /// as little as can be stays changed.
    pub fn undo<M: Machine>(&self, machine: &mut M, cause: PatchError) -> PatchError {
        let mut failed = None;
        for (gpa, bytes) in self.before.iter().rev() {
            if let Err(error) = machine.write(gpa, bytes) {
                failed.get_or_insert(error);
            }
        }
        match failed {
            None => cause,
            Some(undo) => PatchError::Undo {
                cause: Box::new(cause),
                undo,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::{Mock, Op};

    const AT: u64 = Mock::FREE;

    /// Writes that overlap: putting back in any order but the reverse would leave the second's old bytes.
    fn plan() -> WriteBatch {
        let mut plan = WriteBatch::new();
        plan.write(GuestAddress(AT), &[1; 8]);
        plan.write(GuestAddress(AT + 4), &[2; 8]);
        plan.write(GuestAddress(AT + 100), &[3]);
        plan
    }

    fn machine() -> Mock {
        let mut machine = Mock::new(0x40000);
        machine.put(AT, &(0..200).collect::<Vec<u8>>());
        machine.pause().unwrap();
        machine
    }

    #[test]
    fn commits_in_order() {
        let mut machine = machine();
        plan().commit(&mut machine).unwrap();
        assert_eq!(
            machine.ram.low[AT as usize..][..13],
            [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 12]
        );
        assert_eq!(machine.ram.low[AT as usize + 100], 3);
    }

    #[test]
    fn any_failure_leaves_everything_as_it_was() {
        let before = machine().ram;
        for failing in 0..plan().len() {
            let mut machine = machine();
            machine.fail_at = Some(1 + failing);
            let error = plan().commit(&mut machine).unwrap_err();
            assert!(matches!(error, PatchError::Machine(_)), "{error}");
            assert_eq!(machine.ram, before, "write {failing}");
        }
    }

    #[test]
    fn a_write_that_misses_memory_undoes_too() {
        let mut machine = machine();
        let before = machine.ram.clone();
        let mut plan = plan();
        plan.write(GuestAddress(0x3fff8), &[9; 16]);
        let error = plan.commit(&mut machine).unwrap_err();
        assert!(
            matches!(
                &error,
                PatchError::Machine(MachineError::Memory { len: 16, .. })
            ),
            "{error}"
        );
        assert_eq!(machine.ram, before);
    }

    #[test]
    fn a_failing_undo_says_so_and_goes_on() {
        let mut machine = machine();
        let journal = plan().commit(&mut machine).unwrap();
        // The first write of the undo puts the last one back.
        machine.fail_at = Some(machine.ops.len());
        let error = journal.undo(&mut machine, PatchError::NoSuchTask(7));
        assert!(matches!(error, PatchError::Undo { .. }), "{error}");
        assert_eq!(
            machine.ram.low[AT as usize..][..8],
            [0, 1, 2, 3, 4, 5, 6, 7]
        );
        assert_eq!(machine.ram.low[AT as usize + 100], 3);
    }

    #[test]
    fn kernel_writes_follow_the_mapping() {
        let mut machine = Mock::new(0x80000);
        let gva = Gva(0xffff_ffff_8000_0000);
        // Two pages that are neighbours in virtual memory only.
        machine.map(gva, AT + 0x3000, 0x1);
        machine.map(gva.add(0x1000), AT, 0x1);
        machine.pause().unwrap();
        let mut plan = WriteBatch::new();
        let memory = machine.kernel_memory();
        plan.write_kernel(&memory, gva.add(0xffe), b"abcd").unwrap();
        assert!(
            plan.write_kernel(&memory, gva.add(0x1ffe), b"abcd")
                .is_err()
        );
        plan.commit(&mut machine).unwrap();
        assert_eq!(&machine.ram.low[AT as usize + 0x3ffe..][..2], b"ab");
        assert_eq!(&machine.ram.low[AT as usize..][..2], b"cd");
        assert_eq!(machine.ops.len(), 3, "{:?}", machine.ops);
        assert!(matches!(machine.ops[1], Op::Write(_, 2)));
    }
}
