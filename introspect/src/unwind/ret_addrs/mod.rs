//! Recovers the return addresses that tracers have replaced on a task's stack.
//!
//! A kretprobe, an fprobe or the function graph tracer puts the address of its trampoline in place
//! of a return address, and records the true one with the task. Each record says where on the stack
//! the address was. This module knows these records; it must not know what else is on a stack.
//!
//! It follows `arch/x86/kernel/unwind_orc.c: unwind_recover_ret_addr`, and is stricter. A task's
//! records are themselves a stack: the latest belongs to the innermost return address that is
//! replaced, as it will be the first that is returned to. So the walk takes them strictly in order.
//! One that is of another place on the stack, or that is left at the end of the stack, shows that
//! the records and the stack do not fit: the task is in the middle of a call or return, or the walk
//! is wrong. The kernel searches for a record that fits, and does not notice.
//!
//! Needs no lock: only the task itself changes its records, by running. Neither the end of tracing
//! nor the removal of a probe changes one that is in use, so a stack that was walked before is as
//! valid as without tracers. Up to 5.10 the records of kretprobes are in lists that other tasks
//! change, too; those are read in a paused guest only ([`hooks`]).

mod hooks;
mod ret_stack;

use crate::addr::Gva;
use crate::kernel::Kernel;
use crate::unwind::ret_addrs::hooks::Hooks;
use crate::unwind::ret_addrs::ret_stack::RetStack;
use crate::unwind::stack_memory::ReadMemory;

/// The most records that one walk takes. It has at most 100 frames, but several probes of a function,
/// and functions that end by a jump to another one, each have a record for one return address.
const MAX_RECORDS: usize = 256;
/// The most records of other tasks that one walk passes over. A probe has as many as there are tasks
/// in its function, but at most 4096 (`KRETPROBE_MAXACTIVE_MAX`), and each is in one of 64 lists.
const MAX_OF_OTHERS: usize = 4096;

/// Where the tracers of a kernel record the return addresses that they replace.
#[derive(Clone, Debug, Default)]
pub(crate) struct TracerRecords {
    /// The address of each trampoline, and where the addresses that it replaces are recorded.
    sources: Vec<(Gva, Source)>,
}

/// The records of one kind of tracer.
#[derive(Clone, Debug)]
enum Source {
    /// The function graph tracer's.
    RetStack(RetStack),
    /// Those of kretprobes and rethooks.
    Hooks(Hooks),
}

/// A return address that was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// Where on the stack it was.
    retp: Gva,
    /// The address. It can be a trampoline itself.
    ret: Gva,
    /// Where the next older record of the task is; see [`Source::latest`].
    older: u64,
}

impl TracerRecords {
    /// Those of the kernel. A tracer that the kernel lacks, or whose records are not as known, is
    /// left out: the addresses that it replaces cannot be recovered.
    pub(crate) fn new(kernel: &Kernel) -> TracerRecords {
        let ret_stack = RetStack::resolve(&kernel.btf).map(Source::RetStack);
        let ret_stack = ret_stack.map(|source| ("return_to_handler", source));
        let hooks = Hooks::all(kernel).map(|(name, hooks)| (name, Source::Hooks(hooks)));
        let all = ret_stack.into_iter().chain(hooks);
        let at = |(name, source)| Some((kernel.symbols.address(name).ok()?, source));
        TracerRecords {
            sources: all.filter_map(at).collect(),
        }
    }
}

impl Source {
    /// Where the latest record of the task is; 0 if it has none.
    ///
    /// `others`: how many records of other tasks may still be passed over.
    fn latest<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        others: &mut usize,
    ) -> Option<u64> {
        match self {
            Source::RetStack(records) => records.latest(guest, task),
            Source::Hooks(records) => records.latest(guest, task, others),
        }
    }

    /// The record of the task that is there.
    fn record<R: ReadMemory + ?Sized>(
        &self,
        guest: &R,
        task: Gva,
        at: u64,
        others: &mut usize,
    ) -> Option<Record> {
        match self {
            Source::RetStack(records) => records.record(guest, task, at),
            Source::Hooks(records) => records.record(guest, task, at, others),
        }
    }
}

/// The replaced return addresses of one task, in the order in which a walk meets them.
#[derive(Debug)]
pub(crate) struct RetAddrs<'a, R: ?Sized> {
    records: &'a TracerRecords,
    guest: &'a R,
    task: Gva,
    guest_runs: bool,
    /// Where the next record of each source is, once the walk has met one of its trampolines.
    next: Vec<(Gva, u64)>,
    left: usize,
    others: usize,
}

impl<'a, R: ReadMemory + ?Sized> RetAddrs<'a, R> {
    /// Those of the task whose `task_struct` is at `task`. `guest_runs`: other tasks may change
    /// records during the walk, so those in a list for all tasks are not used.
    pub(crate) fn new(
        records: &'a TracerRecords,
        guest: &'a R,
        task: Gva,
        guest_runs: bool,
    ) -> Self {
        RetAddrs {
            records,
            guest,
            task,
            guest_runs,
            next: Vec::new(),
            left: MAX_RECORDS,
            others: MAX_OF_OTHERS,
        }
    }

    /// The address that `trampoline` replaced at `retp` on the stack. It can be that of a
    /// trampoline again: then more than one tracer, or more than one function, uses this return
    /// address.
    pub(crate) fn recover(&mut self, trampoline: Gva, retp: Gva) -> Option<Gva> {
        self.left = self.left.checked_sub(1)?;
        let (_, source) = self.source(trampoline)?;
        if self.guest_runs && source.is_shared() {
            return None;
        }
        let met = self.next.iter().position(|(of, _)| *of == trampoline);
        let at = match met.and_then(|n| self.next.get(n)) {
            Some((_, next)) => *next,
            None => source.latest(self.guest, self.task, &mut self.others)?,
        };
        if at == 0 {
            return None;
        }
        let record = source.record(self.guest, self.task, at, &mut self.others)?;
        match met.and_then(|n| self.next.get_mut(n)) {
            Some((_, next)) => *next = record.older,
            None => self.next.push((trampoline, record.older)),
        }
        (record.retp == retp).then_some(record.ret)
    }

    /// A trampoline that the walk has met, for which records are left.
    pub(crate) fn unused(&self) -> Option<Gva> {
        let mut left = self.next.iter().filter(|(_, next)| *next != 0);
        left.next().map(|(trampoline, _)| *trampoline)
    }

    fn source(&self, trampoline: Gva) -> Option<&'a (Gva, Source)> {
        self.records
            .sources
            .iter()
            .find(|(at, _)| *at == trampoline)
    }
}

impl Source {
    /// Whether the records of all tasks are in one list.
    fn is_shared(&self) -> bool {
        matches!(self, Source::Hooks(hooks) if hooks.is_shared())
    }
}

#[cfg(test)]
pub(crate) mod tests;
