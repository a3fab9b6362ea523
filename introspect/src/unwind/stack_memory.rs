//! The stacks that one walk may be on, and reading from them.
//!
//! Knows ranges of addresses, their order and how to read each only once; it must not know registers, code or how the ranges
//! were found. Follows `arch/x86/kernel/dumpstack_64.c: get_stack_info` and the checks of `unwind_orc.c: stack_access_ok`.

use crate::addr::Gva;
use crate::kernel::{MAX_STACK, StackArea, StackType};
use crate::memory::kernel::KernelMemory;
use crate::unwind::stack::Unreliable;
use crate::unwind::step::StackMemory;

/// Reading guest-virtual memory: all that a walk needs of the guest.
pub trait ReadMemory {
    /// Fills `buf` from `at` on, or says at which address that failed.
    ///
    /// # Errors
    /// The address that could not be read.
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva>;
}

impl ReadMemory for KernelMemory<'_> {
    fn read_virtual(&self, at: Gva, buf: &mut [u8]) -> Result<(), Gva> {
        self.read(at, buf).map_err(|error| error.gva)
    }
}

/// How far below the top of its stack the outermost frame of a task may lie: a `pt_regs` and a first frame, with room.
const NEAR_TOP: u64 = 512;

/// Padding between `pt_regs` of an entry from user mode and the top of the stack: none, or what FRED pushes beyond them
/// (`TOP_OF_KERNEL_STACK_PADDING`).
const TOP_PADDING: u64 = 16;

/// The memory of the stacks of one walk.
///
/// Each stack is entered at most once and read at once, from where it is entered to its top.
#[derive(Debug)]
pub struct WalkMemory<'a, R: ?Sized> {
    guest: &'a R,
    spans: &'a [StackArea],
    /// Stacks not yet entered, by index.
    fresh: u64,
    current: Option<StackArea>,
    window_at: Gva,
    window: Vec<u8>,
}

impl<'a, R: ReadMemory + ?Sized> WalkMemory<'a, R> {
    /// A walk over `spans` (at most 64 of them are seen).
    #[must_use]
    pub fn new(guest: &'a R, spans: &'a [StackArea]) -> Self {
        WalkMemory {
            guest,
            spans,
            fresh: u64::MAX,
            current: None,
            window_at: Gva::NULL,
            window: Vec::new(),
        }
    }

    /// Makes the stack that holds `at..at + len` the current one.
    fn enter(&mut self, at: Gva, len: u64) -> Result<StackArea, Unreliable> {
        let holds = |span: &StackArea| {
            span.range.start <= at
                && at
                    .0
                    .checked_add(len)
                    .is_some_and(|end| end <= span.range.end.0)
        };
        if let Some(current) = self.current.filter(|span| holds(span)) {
            return Ok(current);
        }
        let may_leave = self.current.is_none_or(|span| span.kind.interrupts());
        let found = self
            .spans
            .iter()
            .zip(0u32..64)
            .find(|(span, index)| self.fresh & (1 << index) != 0 && holds(span));
        match found {
            Some((span, index)) if may_leave => {
                self.fresh &= !(1 << index);
                self.current = Some(*span);
                self.window.clear();
                Ok(*span)
            }
            _ => Err(Unreliable::BadStackPointer(at)),
        }
    }

    /// Whether a frame may have its stack pointer at `sp`; the top itself is an empty stack.
    ///
    /// # Errors
    /// When it may not.
    pub fn check_sp(&mut self, sp: Gva) -> Result<(), Unreliable> {
        let at_top = self.current.is_some_and(|span| span.range.end == sp);
        if at_top {
            return Ok(());
        }
        self.enter(sp, 8).map(drop)
    }

    /// Whether going from a frame at `from` to its caller at `to` goes up: on one stack it must.
    #[must_use]
    pub fn rises(&self, from: Gva, to: Gva) -> bool {
        let on = |sp: Gva| {
            self.current
                .is_some_and(|span| span.range.contains(sp) || span.range.end == sp)
        };
        !(on(from) && on(to)) || to > from
    }

    /// Whether registers that end at `end` were pushed by an entry from user mode, which starts at the top of a stack.
    #[must_use]
    pub fn is_entry_from_user(&self, end: Gva) -> bool {
        self.current
            .is_some_and(|span| end <= span.range.end && span.range.end.since(end) <= TOP_PADDING)
    }

    /// Whether the outermost frame of a task's stack may have its stack pointer at `sp`.
    #[must_use]
    pub fn is_stack_begin(&self, sp: Gva) -> bool {
        self.spans.iter().any(|span| {
            span.kind == StackType::Task
                && sp <= span.range.end
                && span.range.end.since(sp) <= NEAR_TOP
        })
    }

    /// Whether every word of guest memory in `proof` still has the value it should have.
    #[must_use]
    pub fn holds(&self, proof: &[(Gva, u64)]) -> bool {
        proof.iter().all(|(at, value)| {
            let mut raw = [0; 8];
            self.guest.read_virtual(*at, &mut raw).is_ok() && u64::from_le_bytes(raw) == *value
        })
    }

    fn fill(&mut self, at: Gva, span: StackArea) -> Result<(), Unreliable> {
        // Registers below the stack pointer are not asked for in order, so a second, longer read may be needed.
        let len = span.range.end.since(at).min(MAX_STACK);
        let len = usize::try_from(len).map_err(|_| Unreliable::BadStackPointer(at))?;
        self.window.clear();
        self.window.resize(len, 0);
        self.window_at = at;
        self.guest
            .read_virtual(at, &mut self.window)
            .map_err(|failed| {
                self.window.clear();
                Unreliable::Unreadable(failed)
            })
    }
}

impl<R: ReadMemory + ?Sized> StackMemory for WalkMemory<'_, R> {
    fn word(&mut self, at: Gva) -> Result<u64, Unreliable> {
        if !at.0.is_multiple_of(8) {
            return Err(Unreliable::BadStackPointer(at));
        }
        let span = self.enter(at, 8)?;
        if self.window.is_empty() || at < self.window_at {
            self.fill(at, span)?;
        }
        let offset = usize::try_from(at.since(self.window_at))
            .map_err(|_| Unreliable::BadStackPointer(at))?;
        self.window
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

    pub(crate) fn span(kind: StackType, start: Gva) -> StackArea {
        StackArea {
            kind,
            range: GvaRange::new(start, start.add(SIZE)),
        }
    }

    /// Every word holds its own address; one page may be missing.
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
    fn a_stack_is_read_once() {
        let guest = Identity::default();
        let spans = [span(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &spans);
        for offset in (0x100..SIZE).step_by(8) {
            assert_eq!(stacks.word(TASK.add(offset)), Ok(TASK.add(offset).0));
        }
        assert_eq!(guest.reads.get(), 1);
        assert_eq!(stacks.word(TASK.add(8)), Ok(TASK.add(8).0));
        assert_eq!(guest.reads.get(), 2);
    }

    #[test]
    fn only_whole_aligned_words_of_known_stacks() {
        let guest = Identity::default();
        let spans = [span(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &spans);
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
        let spans = [span(StackType::Task, TASK), span(StackType::Irq, IRQ)];
        let mut stacks = WalkMemory::new(&guest, &spans);
        assert!(stacks.word(IRQ.add(0x3ff8)).is_ok());
        assert!(stacks.word(TASK.add(0x100)).is_ok());
        let back = IRQ.add(0x3ff8);
        assert_eq!(stacks.word(back), Err(Unreliable::BadStackPointer(back)));
        assert!(stacks.word(TASK.add(0x108)).is_ok());
    }

    #[test]
    fn nothing_lies_behind_a_task_stack() {
        let guest = Identity::default();
        let spans = [span(StackType::Task, TASK), span(StackType::Irq, IRQ)];
        let mut stacks = WalkMemory::new(&guest, &spans);
        assert!(stacks.word(TASK).is_ok());
        assert!(stacks.word(IRQ).is_err());
    }

    #[test]
    fn missing_pages_are_named() {
        let guest = Identity {
            hole: Some(TASK.add(0x2000)),
            ..Identity::default()
        };
        let spans = [span(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &spans);
        assert_eq!(
            stacks.word(TASK.add(0x1000)),
            Err(Unreliable::Unreadable(TASK.add(0x2000)))
        );
        assert!(stacks.word(TASK.add(0x3000)).is_ok());
    }

    #[test]
    fn where_entries_from_user_mode_and_first_frames_lie() {
        let guest = Identity::default();
        let spans = [span(StackType::Task, TASK)];
        let mut stacks = WalkMemory::new(&guest, &spans);
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
