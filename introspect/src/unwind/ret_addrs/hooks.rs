//! The records of kretprobes, and of rethooks, on which fprobes and later kretprobes are built.
//!
//! Each is a structure in a list, the latest first. From 6.0 on (`CONFIG_KRETPROBE_ON_RETHOOK`) it
//! is the `struct rethook_node` in `task_struct.rethooks` (`kernel/trace/rethook.c:
//! rethook_find_ret_addr`), before that the `struct kretprobe_instance` in
//! `task_struct.kretprobe_instances` (`kernel/kprobes.c: kretprobe_find_ret_addr`), and up to 5.10
//! in a hash table for all tasks, `kretprobe_inst_table`. The kernels with the table do not recover
//! addresses when they walk a stack; what `trampoline_handler` returns to is what is found here.

use crate::addr::Gva;
use crate::btf::{Btf, BtfError};
use crate::kernel::Kernel;
use crate::memory::kernel::Field;
use crate::unwind::ret_addrs::Record;
use crate::unwind::stack_memory::ReadMemory;

/// The number of lists of the hash table is 2 to this power (`KPROBE_HASH_BITS`).
const HASH_BITS: u32 = 6;
/// The factor of the kernel's hash (`include/linux/hash.h: GOLDEN_RATIO_64`).
const GOLDEN_RATIO: u64 = 0x61c8_8646_80b5_83eb;
const WORD: u64 = 8;

/// A list of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hooks {
    pub(super) list: List,
    /// The link to the next older record: a pointer to that one's link, or null.
    pub(super) link: Field,
    /// The return address.
    pub(super) ret_addr: Field,
    /// The address on the stack from which it was taken.
    pub(super) frame: Field,
}

/// Where the lists begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// In this field of the `task_struct`.
    OfTask(Field),
    /// In this hash table for all tasks. The field of the structure is the task that it is of.
    Table(Gva, Field),
}

impl Hooks {
    /// Every list that the kernel has, with the name of the trampoline.
    pub(super) fn all(kernel: &Kernel) -> impl Iterator<Item = (&'static str, Hooks)> {
        let table = kernel.symbols.address("kretprobe_inst_table");
        let kretprobes = Hooks::of_kretprobes(&kernel.btf)
            .or_else(|error| Hooks::in_table(&kernel.btf, table.map_err(|_| error)?))
            .ok();
        let rethooks = Hooks::of_rethooks(&kernel.btf).ok();
        let named = [
            ("arch_rethook_trampoline", rethooks),
            ("kretprobe_trampoline", kretprobes),
            ("__kretprobe_trampoline", kretprobes),
        ];
        let known = |hooks: &Hooks| {
            let first = match hooks.list {
                List::OfTask(first) => first,
                List::Table(_, task) => task,
            };
            let fields = [first, hooks.ret_addr, hooks.frame];
            fields.into_iter().all(|field| field.size == WORD)
        };
        let each = named.into_iter();
        each.filter_map(move |(name, hooks)| Some((name, hooks.filter(known)?)))
    }

    fn of_rethooks(btf: &Btf) -> Result<Hooks, BtfError> {
        Ok(Hooks {
            list: List::OfTask(btf.field("task_struct.rethooks.first")?),
            link: btf.field("rethook_node.llist.next")?,
            ret_addr: btf.field("rethook_node.ret_addr")?,
            frame: btf.field("rethook_node.frame")?,
        })
    }

    fn of_kretprobes(btf: &Btf) -> Result<Hooks, BtfError> {
        Ok(Hooks {
            list: List::OfTask(btf.field("task_struct.kretprobe_instances.first")?),
            link: btf.field("kretprobe_instance.llist.next")?,
            ret_addr: btf.field("kretprobe_instance.ret_addr")?,
            frame: btf.field("kretprobe_instance.fp")?,
        })
    }

    fn in_table(btf: &Btf, table: Gva) -> Result<Hooks, BtfError> {
        Ok(Hooks {
            list: List::Table(table, btf.field("kretprobe_instance.task")?),
            link: btf.field("kretprobe_instance.hlist.next")?,
            ret_addr: btf.field("kretprobe_instance.ret_addr")?,
            frame: btf.field("kretprobe_instance.fp")?,
        })
    }

    /// Whether the lists are of all tasks: other tasks change them, too. In a pause that does no
    /// harm, as an entry is added and removed by one store to the `next` pointer that leads to it
    /// (`include/linux/list.h: hlist_add_head`, `__hlist_del`).
    pub(super) fn is_shared(&self) -> bool {
        matches!(self.list, List::Table(..))
    }

    /// The link of the task's latest record; 0 if it has none.
    pub(super) fn latest<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        others: &mut usize,
    ) -> Option<u64> {
        let head = match self.list {
            List::OfTask(first) => first.of(task),
            List::Table(table, _) => table.add(WORD * hash(task)),
        };
        self.skip_others(guest, task, guest.read_word(head).ok()?, others)
    }

    /// The record with this link.
    pub(super) fn record<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        link: u64,
        others: &mut usize,
    ) -> Option<Record> {
        let at = self.link.container(Gva(link));
        let word = |field: Field| guest.read_word(field.of(at)).ok();
        Some(Record {
            retp: Gva(word(self.frame)?),
            ret: Gva(word(self.ret_addr)?),
            older: self.skip_others(guest, task, word(self.link)?, others)?,
        })
    }

    /// The first link, from this one on, of a record of the task; 0 if there is none.
    fn skip_others<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        link: u64,
        others: &mut usize,
    ) -> Option<u64> {
        let List::Table(_, owner) = self.list else {
            return Some(link);
        };
        let mut link = link;
        loop {
            let at = self.link.container(Gva(link));
            if link == 0 || guest.read_word(owner.of(at)).ok()? == task.0 {
                return Some(link);
            }
            *others = others.checked_sub(1)?;
            link = guest.read_word(self.link.of(at)).ok()?;
        }
    }
}

/// The index of the list that a task's records are in (`include/linux/hash.h: hash_ptr`).
pub(super) fn hash(task: Gva) -> u64 {
    task.0.wrapping_mul(GOLDEN_RATIO) >> (u64::BITS - HASH_BITS)
}
