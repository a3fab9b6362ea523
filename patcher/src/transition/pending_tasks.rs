//! Who has not moved yet, in a guest whose kernel keeps no patch states (no `CONFIG_LIVEPATCH`): a table in hidden memory, in which the
//! stubs look the running task up.
//!
//! In it are the addresses of tasks, by open addressing with linear probing. At least every other slot is free, so that every
//! search ends; who is taken out leaves a mark, so that those behind are still found. It is changed in pauses only: a single task is
//! taken out at any time, as one that is just being looked up is in a stub and does not move; all of it is written anew only when
//! nobody is in a stub. A task that is born meanwhile is not in it: it has never been in the old code.
//!
//! Knows addresses and the hash; what it is for, the [`stub`](crate::x86::entry_stub::stub) and the scene know.

use introspect::Gva;

use crate::error::PatchError;
use crate::livepatch::direction::Direction;
use crate::memory::{Allocation, Request};
use crate::x86::entry_stub::PendingTable;

/// Slots of the smallest table.
const LEAST: u64 = 1 << 10;
/// Of the largest: they fit into a window with what stands before them.
const MOST: u64 = 1 << 17;
/// Before the slots: which way those in the table are to go.
const HEADER: u64 = 64;
const SLOT: u64 = 8;
/// In the place of a task that was taken out.
const GONE: u64 = 1;

/// How much memory the table of a guest with so many tasks needs.
#[must_use]
pub fn table_request(tasks: u64) -> Request {
    let count = tasks.saturating_mul(4).clamp(LEAST, MOST);
    Request {
        len: HEADER + SLOT * count.next_power_of_two(),
        align: HEADER,
    }
}

/// The table that fits into `allocation`, which was made for such a request.
#[must_use]
pub fn table_in(allocation: Allocation) -> PendingTable {
    let slots = allocation.range.len().saturating_sub(HEADER) / SLOT;
    PendingTable {
        slots: allocation.range.start.add(HEADER),
        count: 1 << slots.max(1).ilog2(),
        back: allocation.range.start,
    }
}

/// The tasks that have not moved in a transition.
#[derive(Clone, Debug)]
pub struct PendingTasks {
    piece: Allocation,
    table: PendingTable,
    direction: Direction,
    slots: Vec<u64>,
}

impl PendingTasks {
    /// Those of a transition in `direction` that begins, or turns round, with `tasks` still to move.
    ///
    /// # Errors
    /// [`PatchError::TooManyTasks`]: they are more than the table has room for.
    pub fn new(
        piece: Allocation,
        direction: Direction,
        tasks: impl IntoIterator<Item = Gva>,
    ) -> Result<PendingTasks, PatchError> {
        let table = table_in(piece);
        let mut pending = PendingTasks {
            piece,
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

    /// Which way they go.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Whether `task` has yet to move.
    #[must_use]
    pub fn contains(&self, task: Gva) -> bool {
        self.search(task, task.0).is_some()
    }

    /// The whole table, as it is to stand in its piece.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let back = u64::from(self.direction == Direction::Revert);
        let mut bytes = back.to_le_bytes().to_vec();
        bytes.resize(usize::try_from(HEADER).unwrap_or_default(), 0);
        bytes.extend(self.slots.iter().flat_map(|slot| slot.to_le_bytes()));
        bytes
    }

    /// Where it is.
    #[must_use]
    pub fn piece(&self) -> Allocation {
        self.piece
    }

    /// Takes `task` out; what is to be written for that, and where.
    pub fn remove(&mut self, task: Gva) -> Option<(Gva, [u8; 8])> {
        let at = self.search(task, task.0)?;
        *self.slots.get_mut(at)? = GONE;
        Some((self.table.slots.add(SLOT * at as u64), GONE.to_le_bytes()))
    }

    /// From where the search for `task` begins, the first slot that holds `wanted`; none behind a free one.
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

    fn piece(tasks: u64) -> Allocation {
        Allocation::made_up(Gva(0xffff_ffff_ff00_0000), table_request(tasks).len)
    }

    fn task(number: u64) -> Gva {
        Gva(0xffff_8880_0400_0000 + number * 9_792)
    }

    #[test]
    fn tables_grow_with_the_guest_and_not_without_bound() {
        let count = |tasks| table_in(piece(tasks)).count;
        assert_eq!(count(0), LEAST);
        assert_eq!(count(1_000), 4_096);
        assert_eq!(count(u64::MAX), MOST);
        assert!(table_request(u64::MAX).len <= crate::memory::hidden_window::WINDOW_SIZE);
    }

    #[test]
    fn whoever_is_put_in_is_found_until_taken_out() {
        let all: Vec<Gva> = (0..512).map(task).collect();
        let mut pending = PendingTasks::new(piece(0), Direction::Apply, all.clone()).unwrap();
        let found =
            |pending: &PendingTasks| all.iter().filter(|task| pending.contains(**task)).count();
        assert_eq!(found(&pending), 512);
        assert!(!pending.contains(task(512)) && !pending.contains(Gva(GONE)));
        // Every other goes; those that were put in behind it stay within reach.
        for gone in all.iter().step_by(2) {
            let before = pending.bytes();
            let (at, now) = pending.remove(*gone).unwrap();
            let at = usize::try_from(at.since(pending.piece().range.start)).unwrap();
            assert_eq!(before[at..at + 8], gone.0.to_le_bytes());
            assert_eq!(pending.bytes()[at..at + 8], now);
            assert_eq!(pending.remove(*gone), None);
        }
        assert_eq!(found(&pending), 256);
        let stay = |task: &&Gva| pending.contains(**task);
        assert_eq!(all.iter().skip(1).step_by(2).filter(stay).count(), 256);
    }

    #[test]
    fn half_of_it_stays_free() {
        let too_many = (0..513).map(task);
        let error = PendingTasks::new(piece(0), Direction::Revert, too_many).unwrap_err();
        assert!(
            matches!(error, PatchError::TooManyTasks { max: 512 }),
            "{error}"
        );
    }
}
