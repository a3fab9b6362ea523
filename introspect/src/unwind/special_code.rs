//! Which kernel functions need special treatment when a stack passes through them.
//!
//! This module knows names of functions, and why each is listed; it must not know how each class is
//! treated ([`code_map`](crate::unwind::code_map)). A kernel need not have all of them: each
//! generation has its own. A function that is not listed ends no stack.

use crate::addr::GvaRange;
use crate::symbols::Symbols;
use crate::unwind::code_map::CodeClass;

/// Assembly at which the stacks of kernel threads, new tasks and idle tasks end
/// (`arch/x86/entry/entry_64.S`, `arch/x86/kernel/head_64.S`).
const TASK_ENTRIES: &[&str] = &[
    "ret_from_fork",
    "ret_from_fork_asm",
    "secondary_startup_64",
    "secondary_startup_64_no_verify",
    "common_startup_64",
];

/// Entry from and exit to user mode (`arch/x86/entry/entry_64{,_compat,_fred}.S`), with the labels
/// inside that kallsyms lists. `asm_fred_entrypoint_kernel` is not listed: its ORC says END too,
/// but kernel frames follow it.
const USER_ENTRIES: &[&str] = &[
    "entry_SYSCALL_64",
    "entry_SYSCALL_64_safe_stack",
    "entry_SYSCALL_64_after_hwframe",
    "syscall_return_via_sysret",
    "entry_SYSRETQ_unsafe_stack",
    "entry_SYSENTER_compat",
    "entry_SYSENTER_compat_after_hwframe",
    "entry_SYSCALL_compat",
    "entry_SYSCALL_compat_safe_stack",
    "entry_SYSCALL_compat_after_hwframe",
    "entry_SYSRETL_compat_unsafe_stack",
    "entry_SYSCALL32_ignore",
    "entry_INT80_compat",
    "swapgs_restore_regs_and_return_to_usermode",
    "asm_fred_entrypoint_user",
];

/// Functions whose addresses function graph tracing, kretprobes and rethooks put in place of return
/// addresses.
const TRACER_RETURNS: &[&str] = &[
    "return_to_handler",
    "arch_rethook_trampoline",
    "kretprobe_trampoline",
    "__kretprobe_trampoline",
];

/// Code that runs while the stack, or the task that it belongs to, is changing.
const TRANSIENT: &[&str] = &[
    // The stack is already the next task's while `current` is not, or the previous task is not
    // released yet.
    "__switch_to_asm",
    "__switch_to",
    // Return thunks that change the return address.
    "call_depth_return_thunk",
    "entry_untrain_ret",
    "its_return_thunk",
    "retbleed_return_thunk",
    "retbleed_untrain_ret",
    "srso_alias_return_thunk",
    "srso_alias_safe_ret",
    "srso_alias_untrain_ret",
    "srso_return_thunk",
    "srso_safe_ret",
    "srso_untrain_ret",
    "zen_untrain_ret",
    // The stack of a task that is being killed is discarded.
    "rewind_stack_and_make_dead",
    "rewind_stack_do_exit",
];

/// Handlers that may change the stack pointer and then the instruction pointer of the kernel code
/// that they interrupted, to emulate a call or a step (`text_poke`, kprobes). They are accepted
/// when they interrupted user mode: tasks that a debugger has stopped sleep in them.
const BREAKPOINT_HANDLERS: &[&str] = &[
    "asm_exc_int3",
    "exc_int3",
    "do_int3",
    "asm_exc_debug",
    "exc_debug",
];

/// As `TRANSIENT`, by prefix: compilers add suffixes, and there is one thunk for each register.
const TRANSIENT_PREFIXES: &[&str] = &["finish_task_switch", "__x86_indirect_"];

/// The special ranges of the kernel with these symbols, within its `text`, sorted and disjoint.
#[must_use]
pub(crate) fn special_ranges(symbols: &Symbols, text: GvaRange) -> Vec<(GvaRange, CodeClass)> {
    let named = [
        (TASK_ENTRIES, CodeClass::TaskEntry),
        (USER_ENTRIES, CodeClass::UserEntry),
        (TRACER_RETURNS, CodeClass::Traced),
        (TRANSIENT, CodeClass::Transient),
        (BREAKPOINT_HANDLERS, CodeClass::Breakpoint),
    ];
    let mut ranges: Vec<(GvaRange, CodeClass)> = named
        .into_iter()
        .flat_map(|(names, class)| names.iter().map(move |name| (*name, class)))
        .flat_map(|(name, class)| symbols.all(name).map(move |symbol| (symbol.gva, class)))
        .chain(TRANSIENT_PREFIXES.iter().flat_map(|prefix| {
            symbols
                .prefixed(prefix)
                .map(|symbol| (symbol.gva, CodeClass::Transient))
        }))
        .filter_map(|(gva, class)| Some((symbols.extent(gva)?, class)))
        .filter(|(range, _)| text.contains(range.start) && !range.is_empty())
        .collect();
    ranges.sort_by_key(|(range, _)| range.start);
    ranges.dedup_by_key(|(range, _)| range.start);
    ranges
}

/// Functions at which a task that has never run starts: its saved return address is exactly this.
pub(crate) const NEW_TASK_ENTRIES: &[&str] = &["ret_from_fork_asm", "ret_from_fork"];

/// Ordinary functions that every kernel has: at the first instruction of each, only the return
/// address is on the stack.
pub(crate) const ORDINARY_FUNCTIONS: &[&str] = &[
    "schedule",
    "do_exit",
    "vfs_read",
    "vfs_write",
    "kthread_stop",
    "wake_up_process",
    "do_syscall_64",
    "msleep",
];
