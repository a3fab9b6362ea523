//! Which of a kernel's functions need a class of their own when a stack passes through them.
//!
//! Knows names, and why each is here; it must not know what is done about them. Names that a kernel lacks are no error: each
//! generation has its own. What is not named here ends no stack.

use crate::addr::GvaRange;
use crate::symbols::Symbols;
use crate::unwind::code_map::CodeClass;

/// Assembly that kernel threads, new tasks and idle tasks begin in (`arch/x86/entry/entry_64.S`, `arch/x86/kernel/head_64.S`).
const TASK_ENTRIES: &[&str] = &[
    "ret_from_fork",
    "ret_from_fork_asm",
    "secondary_startup_64",
    "secondary_startup_64_no_verify",
    "common_startup_64",
];

/// Entry from and exit to user mode (`arch/x86/entry/entry_64{,_compat,_fred}.S`), with the labels inside that kallsyms lists.
/// `asm_fred_entrypoint_kernel` is not among them: it says END too, and kernel frames lie below it.
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

/// Return addresses that function graph tracing, kretprobes and rethooks put in the place of the real ones.
const TRACER_RETURNS: &[&str] = &[
    "return_to_handler",
    "arch_rethook_trampoline",
    "kretprobe_trampoline",
    "__kretprobe_trampoline",
];

/// Code that runs while the stack or its owner is changing.
const TRANSIENT: &[&str] = &[
    // The stack is already the next task's, and `current` is not, or the previous task is not yet let go.
    "__switch_to_asm",
    "__switch_to",
    // Return thunks that play with the return address.
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
    // The stack is thrown away under a task that is being killed.
    "rewind_stack_and_make_dead",
    "rewind_stack_do_exit",
];

/// Handlers that may change the stack pointer and then the ip of the kernel code that they interrupted, to emulate a call or a
/// step (`text_poke`, kprobes). What they interrupt in user mode is left alone: a debugger's stopped tasks sleep in them.
const BREAKPOINT_HANDLERS: &[&str] = &[
    "asm_exc_int3",
    "exc_int3",
    "do_int3",
    "asm_exc_debug",
    "exc_debug",
];

/// As `TRANSIENT`, for families of names: compilers add suffixes, thunks come one for each register.
const TRANSIENT_PREFIXES: &[&str] = &["finish_task_switch", "__x86_indirect_"];

/// The ranges that hold for the kernel of these symbols, within its `text`.
#[must_use]
pub fn special_ranges(symbols: &Symbols, text: GvaRange) -> Vec<(GvaRange, CodeClass)> {
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

/// Where a task that has never run begins: its saved return address is exactly this.
pub const NEW_TASK_ENTRIES: &[&str] = &["ret_from_fork_asm", "ret_from_fork"];

/// Ordinary functions that every kernel has: where each begins, only the return address is on the stack.
pub const ORDINARY_FUNCTIONS: &[&str] = &[
    "schedule",
    "do_exit",
    "vfs_read",
    "vfs_write",
    "kthread_stop",
    "wake_up_process",
    "do_syscall_64",
    "msleep",
];
