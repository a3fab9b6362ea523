//! [`WriteBatch`]: a set of guest writes that happens whole or not at all.
//!
//! Everything that one pause changes is first *planned*, while the guest's memory is only read, and
//! then committed. The commit keeps the old bytes; when a write fails it restores them, last write
//! first. Within one pause nothing else writes, so the undo is exact. A later pause has a batch of
//! its own: this module never undoes across a resume. [`Patcher`](crate::patcher) commits the
//! batches of pauses; hidden memory that the guest does not map yet is filled outside of pauses.
//!
//! This module knows addresses and bytes only.

use std::ops::Range;

use introspect::memory::{KernelMemory, ReadError};
use introspect::{Gva, PhysMemory};
use vm_memory::GuestAddress;

use crate::error::PatchError;
use crate::machine::{Machine, MachineError};

/// Writes in their order. Their bytes are stored in one buffer, one after the other: a transition
/// of many tasks has many small writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Writes {
    /// Of each write, its address and where its bytes are in `bytes`.
    entries: Vec<(GuestAddress, Range<usize>)>,
    bytes: Vec<u8>,
}

impl Writes {
    fn push(&mut self, gpa: GuestAddress, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.entries.push((gpa, start..self.bytes.len()));
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = (GuestAddress, &[u8])> {
        let bytes = |range: &Range<usize>| self.bytes.get(range.clone()).unwrap_or_default();
        self.entries
            .iter()
            .map(move |(gpa, range)| (*gpa, bytes(range)))
    }

    /// Removes all but the first `len`.
    fn truncate(&mut self, len: usize) {
        if let Some((_, range)) = self.entries.get(len) {
            self.bytes.truncate(range.start);
        }
        self.entries.truncate(len);
    }
}

/// The writes of one pause, in the order in which they are to happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteBatch {
    writes: Writes,
}

impl WriteBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> WriteBatch {
        WriteBatch::default()
    }

    /// Appends a write of `bytes` at `gpa`.
    pub fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) {
        self.writes.push(gpa, bytes);
    }

    /// Appends a write at a kernel virtual address, whatever the guest's own protection of the
    /// page.
    ///
    /// # Errors
    /// [`ReadError`] when (part of) the range is not mapped; then nothing is added.
    pub fn write_kernel(
        &mut self,
        memory: &KernelMemory<'_>,
        gva: Gva,
        bytes: &[u8],
    ) -> Result<(), ReadError> {
        let before = self.writes.entries.len();
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
        self.writes.entries.len()
    }

    /// Carries out the writes. Only while `machine` is paused.
    ///
    /// # Errors
    /// [`PatchError::Machine`] with everything as before, or [`PatchError::Undo`] when the undo
    /// failed as well.
    pub fn commit<M: Machine>(&self, machine: &mut M) -> Result<UndoLog, PatchError> {
        let mut undo_log = UndoLog::default();
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
                return Err(undo_log.undo(machine, cause.into()));
            }
            undo_log.before.push(gpa, &old);
        }
        Ok(undo_log)
    }
}

/// The old bytes of a committed batch. Valid in the pause in which it was committed.
#[derive(Debug, Default)]
pub struct UndoLog {
    before: Writes,
}

impl UndoLog {
    /// Restores everything, last write first, because of `cause`, and returns the error to report.
    /// Continues past failures, so that as little as possible stays changed.
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

    /// Writes that overlap: an undo in any order but the reverse would leave the second's old
    /// bytes.
    fn batch() -> WriteBatch {
        let mut batch = WriteBatch::new();
        batch.write(GuestAddress(AT), &[1; 8]);
        batch.write(GuestAddress(AT + 4), &[2; 8]);
        batch.write(GuestAddress(AT + 100), &[3]);
        batch
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
        batch().commit(&mut machine).unwrap();
        assert_eq!(
            machine.ram.low[AT as usize..][..13],
            [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 12]
        );
        assert_eq!(machine.ram.low[AT as usize + 100], 3);
    }

    #[test]
    fn any_failure_leaves_everything_as_it_was() {
        let before = machine().ram;
        for failing in 0..batch().len() {
            let mut machine = machine();
            machine.fail_at = Some(1 + failing);
            let error = batch().commit(&mut machine).unwrap_err();
            assert!(matches!(error, PatchError::Machine(_)), "{error}");
            assert_eq!(machine.ram, before, "write {failing}");
        }
    }

    #[test]
    fn a_write_that_misses_memory_undoes_too() {
        let mut machine = machine();
        let before = machine.ram.clone();
        let mut batch = batch();
        batch.write(GuestAddress(0x3fff8), &[9; 16]);
        let error = batch.commit(&mut machine).unwrap_err();
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
    fn a_failing_undo_is_reported_and_continues() {
        let mut machine = machine();
        let undo_log = batch().commit(&mut machine).unwrap();
        // The first write of the undo restores the last one.
        machine.fail_at = Some(machine.ops.len());
        let error = undo_log.undo(&mut machine, PatchError::NoSuchTask(7));
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
        let mut batch = WriteBatch::new();
        let memory = machine.kernel_memory();
        batch
            .write_kernel(&memory, gva.add(0xffe), b"abcd")
            .unwrap();
        assert!(
            batch
                .write_kernel(&memory, gva.add(0x1ffe), b"abcd")
                .is_err()
        );
        batch.commit(&mut machine).unwrap();
        assert_eq!(&machine.ram.low[AT as usize + 0x3ffe..][..2], b"ab");
        assert_eq!(&machine.ram.low[AT as usize..][..2], b"cd");
        assert_eq!(machine.ops.len(), 3, "{:?}", machine.ops);
        assert!(matches!(machine.ops[1], Op::Write(_, 2)));
    }
}
