//! The memory of the stacks that one walk may be on.
//!
//! This module knows ranges of addresses, the order in which stacks may follow each other, and how
//! to read each only once; it must not know registers, code, or how the ranges were found. It
//! follows `arch/x86/kernel/dumpstack_64.c: get_stack_info` and the checks of `unwind_orc.c:
//! stack_access_ok`.

use crate::addr::Gva;
use crate::kernel::{MAX_STACK, StackArea, StackType};
use crate::memory::kernel::KernelMemory;
use crate::unwind::stack::Unreliable;
use crate::unwind::step::StackMemory;

/// Read access to guest-virtual memory: all that a walk needs of the guest.
pub(crate) trait ReadMemory {
    /// Fills `buf` from `at` on.
    ///
    /// # Errors
    /// The first address that could not be read.
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva>;

    /// The eight bytes at `at`.
    ///
    /// # Errors
    /// The first address that could not be read.
    fn read_word(&self, at: Gva) -> Result<u64, Gva> {
        let mut raw = [0; 8];
        self.read_virtual(at, &mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }
}

impl ReadMemory for KernelMemory<'_> {
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva> {
        self.read(at, buf).map_err(|error| error.gva)
    }
}

/// How far below the top of its stack the outermost frame of a task may be: a `pt_regs` and one
/// frame, with some margin.
const MAX_OUTERMOST_FRAME: u64 = 512;

/// Padding between `pt_regs` of an entry from user mode and the top of the stack: none, or what
/// FRED pushes beyond them (`TOP_OF_KERNEL_STACK_PADDING`).
const TOP_PADDING: u64 = 16;

/// The memory of the stacks of one walk.
///
/// Each stack is entered at most once and copied at once, from where it is entered to its top.
#[derive(Debug)]
pub(crate) struct WalkMemory<'a, R: ?Sized> {
    guest: &'a R,
    areas: &'a [StackArea],
    /// Bit mask of the stacks that were not entered yet, by index in `areas`.
    not_entered: u64,
    current: Option<StackArea>,
    copied_from: Gva,
    copied: Vec<u8>,
}

impl<'a, R: ReadMemory + ?Sized> WalkMemory<'a, R> {
    /// Memory of a walk over `areas`, of which only the first 64 are used.
    #[must_use]
    pub(crate) fn new(guest: &'a R, areas: &'a [StackArea]) -> Self {
        WalkMemory {
            guest,
            areas,
            not_entered: u64::MAX,
            current: None,
            copied_from: Gva::NULL,
            copied: Vec::new(),
        }
    }

    /// Makes the stack that contains `at..at + len` the current one.
    fn enter(&mut self, at: Gva, len: u64) -> Result<StackArea, Unreliable> {
        let contains = |area: &StackArea| {
            area.range.start <= at
                && at
                    .0
                    .checked_add(len)
                    .is_some_and(|end| end <= area.range.end.0)
        };
        if let Some(current) = self.current.filter(|area| contains(area)) {
            return Ok(current);
        }
        let may_leave = self.current.is_none_or(|area| area.kind.interrupts());
        let found = self
            .areas
            .iter()
            .zip(0u32..64)
            .find(|(area, index)| self.not_entered & (1 << index) != 0 && contains(area));
        match found {
            Some((area, index)) if may_leave => {
                self.not_entered &= !(1 << index);
                self.current = Some(*area);
                self.copied.clear();
                Ok(*area)
            }
            _ => Err(Unreliable::BadStackPointer(at)),
        }
    }

    /// Checks that a frame may have its stack pointer at `sp`; at the top itself, the stack is
    /// empty.
    ///
    /// # Errors
    /// [`Unreliable::BadStackPointer`] when it may not.
    pub(crate) fn check_sp(&mut self, sp: Gva) -> Result<(), Unreliable> {
        let at_top = self.current.is_some_and(|area| area.range.end == sp);
        if at_top {
            return Ok(());
        }
        self.enter(sp, 8).map(drop)
    }

    /// Whether the stack pointer may go from `from` in a frame to `to` in its caller: within one
    /// stack it must rise.
    #[must_use]
    pub(crate) fn rises(&self, from: Gva, to: Gva) -> bool {
        let on = |sp: Gva| {
            self.current
                .is_some_and(|area| area.range.contains(sp) || area.range.end == sp)
        };
        !(on(from) && on(to)) || to > from
    }

    /// Whether a `pt_regs` that ends at `end` was pushed by an entry from user mode, which starts
    /// at the top of a stack.
    #[must_use]
    pub(crate) fn is_entry_from_user(&self, end: Gva) -> bool {
        self.current
            .is_some_and(|area| end <= area.range.end && area.range.end.since(end) <= TOP_PADDING)
    }

    /// Whether the outermost frame of a task may have its stack pointer at `sp`.
    #[must_use]
    pub(crate) fn is_stack_begin(&self, sp: Gva) -> bool {
        self.areas.iter().any(|area| {
            area.kind == StackType::Task
                && sp <= area.range.end
                && area.range.end.since(sp) <= MAX_OUTERMOST_FRAME
        })
    }

    /// Whether each of these addresses in guest memory still has its value.
    #[must_use]
    pub(crate) fn has_words(&self, words: &[(Gva, u64)]) -> bool {
        words
            .iter()
            .all(|(at, value)| self.guest.read_word(*at) == Ok(*value))
    }

    fn copy_to_top(&mut self, at: Gva, area: StackArea) -> Result<(), Unreliable> {
        // Words below the stack pointer are not read in order, so a second, longer read may be
        // needed.
        let len = area.range.end.since(at).min(MAX_STACK);
        let len = usize::try_from(len).map_err(|_| Unreliable::BadStackPointer(at))?;
        self.copied.clear();
        self.copied.resize(len, 0);
        self.copied_from = at;
        self.guest
            .read_virtual(at, &mut self.copied)
            .map_err(|failed| {
                self.copied.clear();
                Unreliable::Unreadable(failed)
            })
    }
}

impl<R: ReadMemory + ?Sized> StackMemory for WalkMemory<'_, R> {
    fn word(&mut self, at: Gva) -> Result<u64, Unreliable> {
        if !at.0.is_multiple_of(8) {
            return Err(Unreliable::BadStackPointer(at));
        }
        let area = self.enter(at, 8)?;
        if self.copied.is_empty() || at < self.copied_from {
            self.copy_to_top(at, area)?;
        }
        let offset = usize::try_from(at.since(self.copied_from))
            .map_err(|_| Unreliable::BadStackPointer(at))?;
        self.copied
            .get(offset..)
            .and_then(|rest| rest.first_chunk())
            .map(|word| u64::from_le_bytes(*word))
            .ok_or(Unreliable::Unreadable(at))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::addr::GvaRange;

    pub(crate) const TASK: Gva = Gva(0xffff_c900_0010_0000);
    pub(crate) const IRQ: Gva = Gva(0xffff_c900_0020_0000);
    pub(crate) const SIZE: u64 = 0x4000;

    pub(crate) fn area(kind: StackType, start: Gva) -> StackArea {
        StackArea {
            kind,
            range: GvaRange::new(start, start.add(SIZE)),
        }
    }

    /// Every word contains its own address; one page may be missing.
    #[derive(Default)]
    pub(crate) struct Identity {
        pub(crate) reads: Cell<usize>,
        pub(crate) hole: Option<Gva>,
    }

    impl ReadMemory for Identity {
        fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva> {
            self.reads.set(self.reads.get() + 1);
            let end = at.add(buf.len() as u64);
            if let Some(hole) = self.hole.filter(|hole| at <= *hole && *hole < end) {
                return Err(hole);
            }
            for (word, i) in buf.chunks_mut(8).zip(0u64..) {
                let bytes = at.add(8 * i).0.to_le_bytes();
                word.copy_from_slice(&bytes[..word.len()]);
            }
            Ok(())
        }
    }

    #[test]
    fn a_stack_is_copied_once() {
        let guest = Identity::default();
        let areas = [area(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        for offset in (0x100..SIZE).step_by(8) {
            assert_eq!(stacks.word(TASK.add(offset)), Ok(TASK.add(offset).0));
        }
        assert_eq!(guest.reads.get(), 1);
        assert_eq!(stacks.word(TASK.add(8)), Ok(TASK.add(8).0));
        assert_eq!(guest.reads.get(), 2);
    }

    #[test]
    fn only_aligned_words_within_the_stacks_can_be_read() {
        let guest = Identity::default();
        let areas = [area(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        for at in [
            TASK.sub(8),
            TASK.add(SIZE),
            TASK.add(4),
            Gva(0),
            Gva(u64::MAX - 7),
        ] {
            assert_eq!(stacks.word(at), Err(Unreliable::BadStackPointer(at)));
        }
    }

    #[test]
    fn from_an_interrupt_stack_to_the_tasks_and_not_back() {
        let guest = Identity::default();
        let areas = [area(StackType::Task, TASK), area(StackType::Irq, IRQ)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        assert!(stacks.word(IRQ.add(0x3ff8)).is_ok());
        assert!(stacks.word(TASK.add(0x100)).is_ok());
        let back = IRQ.add(0x3ff8);
        assert_eq!(stacks.word(back), Err(Unreliable::BadStackPointer(back)));
        assert!(stacks.word(TASK.add(0x108)).is_ok());
    }

    #[test]
    fn no_stack_follows_a_task_stack() {
        let guest = Identity::default();
        let areas = [area(StackType::Task, TASK), area(StackType::Irq, IRQ)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        assert!(stacks.word(TASK).is_ok());
        assert!(stacks.word(IRQ).is_err());
    }

    #[test]
    fn errors_have_the_missing_page() {
        let guest = Identity {
            hole: Some(TASK.add(0x2000)),
            ..Identity::default()
        };
        let areas = [area(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        assert_eq!(
            stacks.word(TASK.add(0x1000)),
            Err(Unreliable::Unreadable(TASK.add(0x2000)))
        );
        assert!(stacks.word(TASK.add(0x3000)).is_ok());
    }

    #[test]
    fn entries_from_user_mode_and_outermost_frames_are_near_the_top() {
        let guest = Identity::default();
        let areas = [area(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &areas);
        let top = TASK.add(SIZE);
        assert!(!stacks.is_entry_from_user(top), "not on a stack yet");
        stacks.word(top.sub(8)).unwrap();
        assert!(stacks.is_entry_from_user(top));
        assert!(stacks.is_entry_from_user(top.sub(16)));
        assert!(!stacks.is_entry_from_user(top.sub(24)));
        assert!(!stacks.is_entry_from_user(top.add(8)));
        assert!(stacks.is_stack_begin(top.sub(168)));
        assert!(!stacks.is_stack_begin(top.sub(0x1000)));
    }
}
