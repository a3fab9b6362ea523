//! The function graph tracer's records: `task_struct.ret_stack`.
//!
//! This module follows `kernel/trace/fgraph.c: ftrace_graph_ret_addr`. Up to 6.10 it is an array of
//! `struct ftrace_ret_stack`, of which `curr_ret_stack` is the index of the latest, or -1. From 6.11
//! on it is an array of words, of which `curr_ret_stack` are in use. Each `struct ftrace_ret_stack`
//! is followed by a word that says who wants to be called when the function returns, and then by any
//! data that these have reserved. The word after each of these parts leads back to the structure.
//! BTF does not describe the words, so the bits that are used are checked where they are redundant.

use crate::addr::Gva;
use crate::btf::{Btf, BtfError};
use crate::memory::kernel::Field;
use crate::unwind::ret_addrs::Record;
use crate::unwind::stack_memory::ReadMemory;

/// Most structures or words in use. The kernel has 50 structures (`FTRACE_RETFUNC_DEPTH`) or 512
/// words (`SHADOW_STACK_SIZE`).
const MAX_LEN: u64 = 1 << 12;

/// The lowest bits of a word: the distance in words to the structure that it follows
/// (`FGRAPH_FRAME_OFFSET_MASK`).
const DISTANCE: u64 = (1 << 10) - 1;
/// The two bits above: what the word is (`FGRAPH_TYPE_SHIFT`, `FGRAPH_TYPE_MASK`).
const TYPE_SHIFT: u32 = 10;
const TYPE: u64 = 3;
/// The word says who wants to be called (`FGRAPH_TYPE_BITMAP`). Before it is written, the function
/// is still being entered.
const TYPE_BITMAP: u64 = 1;
const WORD: u64 = 8;

/// Where the records lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RetStack {
    /// `task_struct.ret_stack`.
    pub(super) ret_stack: Field,
    /// `task_struct.curr_ret_stack`, an `int`.
    pub(super) curr_ret_stack: Field,
    /// `ftrace_ret_stack.ret`.
    pub(super) ret: Field,
    /// `ftrace_ret_stack.retp`.
    pub(super) retp: Field,
    /// The size of a `struct ftrace_ret_stack` in bytes.
    pub(super) size: u64,
    /// Whether `ret_stack` is an array of words.
    pub(super) words: bool,
}

impl RetStack {
    /// Where the kernel has them; `None` without the function graph tracer.
    pub(crate) fn resolve(btf: &Btf) -> Option<RetStack> {
        RetStack::of(btf).ok().flatten()
    }

    fn of(btf: &Btf) -> Result<Option<RetStack>, BtfError> {
        let found = RetStack {
            ret_stack: btf.field("task_struct.ret_stack")?,
            curr_ret_stack: btf.field("task_struct.curr_ret_stack")?,
            ret: btf.field("ftrace_ret_stack.ret")?,
            retp: btf.field("ftrace_ret_stack.retp")?,
            size: btf.size_of("ftrace_ret_stack")?,
            words: !btf.points_to("task_struct.ret_stack", "ftrace_ret_stack")?,
        };
        let is_word = |field: Field| field.size == WORD;
        let known = found.curr_ret_stack.size == 4
            && [found.ret_stack, found.ret, found.retp]
                .into_iter()
                .all(is_word)
            && found.size.is_multiple_of(WORD)
            && (WORD..=MAX_LEN).contains(&found.size);
        Ok(known.then_some(found))
    }

    /// How many structures or words are in use: the latest record is at their end.
    pub(super) fn latest<R: ReadMemory + ?Sized>(&self, guest: &R, task: Gva) -> Option<u64> {
        let mut raw = [0; 4];
        guest
            .read_virtual(self.curr_ret_stack.of(task), &mut raw)
            .ok()?;
        let current = i64::from(i32::from_le_bytes(raw));
        let used = u64::try_from(if self.words { current } else { current + 1 }).ok()?;
        (used <= MAX_LEN).then_some(used)
    }

    /// The record that ends after `used` structures or words.
    pub(super) fn record<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        used: u64,
    ) -> Option<Record> {
        let base = Gva(guest.read_word(self.ret_stack.of(task)).ok()?);
        let (older, at) = match self.words {
            false => {
                let index = used.checked_sub(1)?;
                (index, base.add(index * self.size))
            }
            true => {
                let start = self.start(guest, base, used)?;
                (start, base.add(start * WORD))
            }
        };
        Some(Record {
            retp: Gva(guest.read_word(self.retp.of(at)).ok()?),
            ret: Gva(guest.read_word(self.ret.of(at)).ok()?),
            older,
        })
    }

    /// The index of the first word of the structure of the record that ends after `used` words.
    fn start<R: ReadMemory + ?Sized>(&self, guest: &R, base: Gva, used: u64) -> Option<u64> {
        let word = |index: u64| guest.read_word(base.add(index * WORD)).ok();
        let len = self.size / WORD;
        let last = used.checked_sub(1)?;
        let start = last.checked_sub(word(last)? & DISTANCE)?;
        let bitmap = start.checked_add(len).filter(|bitmap| *bitmap <= last)?;
        let follows = word(bitmap)?;
        let is_bitmap = follows & DISTANCE == len && follows >> TYPE_SHIFT & TYPE == TYPE_BITMAP;
        is_bitmap.then_some(start)
    }
}
