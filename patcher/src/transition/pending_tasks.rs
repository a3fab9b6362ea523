//! The tasks that have not switched, in a guest whose kernel keeps no patch states (no
//! `CONFIG_LIVEPATCH`): a table in hidden memory, in which the stubs look the running task up.
//!
//! The table is a hash table of `task_struct` addresses with open addressing and linear probing. At
//! least every other slot is free, so that every search ends. A removed task leaves a mark in its
//! slot, so that tasks past it are still found. The table is changed in pauses only. A single task
//! may be removed at any time: a task that is being looked up is in a stub, and so is not switched.
//! The table is rewritten as a whole only when no task is in a stub. A task that is forked during
//! the transition is not in the table: it is in no function that the transition leaves.
//!
//! This module knows addresses and the hash; it must not know what a lookup is for. That is known
//! to [`entry_stub`](crate::x86::entry_stub) and to the [`step`](crate::transition::step).

use introspect::Gva;

use crate::error::PatchError;
use crate::livepatch::direction::Direction;
use crate::memory::{Allocation, Request};
use crate::x86::entry_stub::PendingTable;

/// Slots of the smallest table.
const MIN_SLOTS: u64 = 1 << 10;
/// Slots of the largest table: with the header they fit into one block of hidden memory.
const MAX_SLOTS: u64 = 1 << 17;
/// Bytes before the slots. The first 8 of them say which way the tasks in the table switch.
const HEADER_LEN: u64 = 64;
const SLOT_LEN: u64 = 8;
/// The content of a slot whose task was removed.
const REMOVED: u64 = 1;

/// The memory that the table of a guest with this many tasks needs.
#[must_use]
pub fn table_request(tasks: u64) -> Request {
    let count = tasks.saturating_mul(4).clamp(MIN_SLOTS, MAX_SLOTS);
    Request {
        len: HEADER_LEN + SLOT_LEN * count.next_power_of_two(),
        align: HEADER_LEN,
    }
}

/// The table in `allocation`, which was made for a [`table_request`].
#[must_use]
pub fn table_in(allocation: Allocation) -> PendingTable {
    let slots = allocation.range.len().saturating_sub(HEADER_LEN) / SLOT_LEN;
    PendingTable {
        slots: allocation.range.start.add(HEADER_LEN),
        count: 1 << slots.max(1).ilog2(),
        reverting: allocation.range.start,
    }
}

/// The tasks that have not switched in a transition.
#[derive(Clone, Debug)]
pub struct PendingTasks {
    allocation: Allocation,
    table: PendingTable,
    direction: Direction,
    slots: Vec<u64>,
}

impl PendingTasks {
    /// The pending `tasks` of a transition that is started in, or reversed to, `direction`.
    ///
    /// # Errors
    /// [`PatchError::TooManyTasks`] if they are more than the table takes.
    pub fn new(
        allocation: Allocation,
        direction: Direction,
        tasks: impl IntoIterator<Item = Gva>,
    ) -> Result<PendingTasks, PatchError> {
        let table = table_in(allocation);
        let mut pending = PendingTasks {
            allocation,
            table,
            direction,
            slots: vec![0; usize::try_from(table.count).unwrap_or_default()],
        };
        for (used, task) in (0..).zip(tasks) {
            let free = pending.search(task, 0).filter(|_| used < table.count / 2);
            match free.and_then(|at| pending.slots.get_mut(at)) {
                Some(slot) => *slot = task.0,
                None => {
                    return Err(PatchError::TooManyTasks {
                        max: table.count / 2,
                    });
                }
            }
        }
        Ok(pending)
    }

    /// Which way the tasks switch.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Whether `task` has not switched yet.
    #[must_use]
    pub fn contains(&self, task: Gva) -> bool {
        self.search(task, task.0).is_some()
    }

    /// The content of the whole table.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let reverting = u64::from(self.direction == Direction::Revert);
        let mut bytes = reverting.to_le_bytes().to_vec();
        bytes.resize(usize::try_from(HEADER_LEN).unwrap_or_default(), 0);
        bytes.extend(self.slots.iter().flat_map(|slot| slot.to_le_bytes()));
        bytes
    }

    /// The memory of the table.
    #[must_use]
    pub fn allocation(&self) -> Allocation {
        self.allocation
    }

    /// Removes `task`. Returns what has to be written for that, and where; `None` if the task is
    /// not in the table.
    pub fn remove(&mut self, task: Gva) -> Option<(Gva, [u8; 8])> {
        let at = self.search(task, task.0)?;
        *self.slots.get_mut(at)? = REMOVED;
        Some((
            self.table.slots.add(SLOT_LEN * at as u64),
            REMOVED.to_le_bytes(),
        ))
    }

    /// The first slot that holds `wanted`, from where the search for `task` starts up to the first
    /// free slot.
    fn search(&self, task: Gva, wanted: u64) -> Option<usize> {
        let first = self.table.first(task);
        for step in 0..self.table.count {
            let at = usize::try_from((first + step) % self.table.count).ok()?;
            match *self.slots.get(at)? {
                found if found == wanted => return Some(at),
                0 => return None,
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocation(tasks: u64) -> Allocation {
        Allocation::made_up(Gva(0xffff_ffff_ff00_0000), table_request(tasks).len)
    }

    fn task(number: u64) -> Gva {
        Gva(0xffff_8880_0400_0000 + number * 9_792)
    }

    #[test]
    fn tables_grow_with_the_guest_and_not_without_bound() {
        let count = |tasks| table_in(allocation(tasks)).count;
        assert_eq!(count(0), MIN_SLOTS);
        assert_eq!(count(1_000), 4_096);
        assert_eq!(count(u64::MAX), MAX_SLOTS);
        assert!(table_request(u64::MAX).len <= crate::memory::hidden_window::WINDOW_SIZE);
    }

    #[test]
    fn every_task_is_found_until_it_is_removed() {
        let all: Vec<Gva> = (0..512).map(task).collect();
        let mut pending = PendingTasks::new(allocation(0), Direction::Apply, all.clone()).unwrap();
        let found =
            |pending: &PendingTasks| all.iter().filter(|task| pending.contains(**task)).count();
        assert_eq!(found(&pending), 512);
        assert!(!pending.contains(task(512)) && !pending.contains(Gva(REMOVED)));
        // Every other task is removed; those in the slots past it are still found.
        for removed in all.iter().step_by(2) {
            let before = pending.bytes();
            let (at, now) = pending.remove(*removed).unwrap();
            let at = usize::try_from(at.since(pending.allocation().range.start)).unwrap();
            assert_eq!(before[at..at + 8], removed.0.to_le_bytes());
            assert_eq!(pending.bytes()[at..at + 8], now);
            assert_eq!(pending.remove(*removed), None);
        }
        assert_eq!(found(&pending), 256);
        let is_found = |task: &&Gva| pending.contains(**task);
        assert_eq!(all.iter().skip(1).step_by(2).filter(is_found).count(), 256);
    }

    #[test]
    fn half_of_the_table_stays_free() {
        let too_many = (0..513).map(task);
        let error = PendingTasks::new(allocation(0), Direction::Revert, too_many).unwrap_err();
        assert!(
            matches!(error, PatchError::TooManyTasks { max: 512 }),
            "{error}"
        );
    }
}
