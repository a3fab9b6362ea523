//! What patching needs of a guest kernel: addresses, structure fields and flag bits, each resolved
//! by its name, once.
//!
//! This module knows symbols and types; it must not read what changes while the guest runs.

use introspect::kernel::LockWord;
use introspect::{Field, Gva, GvaRange, Kernel, PerCpuKind, SymbolError};

use crate::error::{PatchError, unexpected};
use crate::ftrace::FtraceLayout;
use crate::ftrace::ops::FtraceOps;
use crate::registration::layout::RegistrationLayout;
use crate::x86::entry_stub::CurrentVar;

/// Where the guest's own livepatching keeps its state (`kernel/livepatch/transition.c`).
#[derive(Clone, Debug)]
pub struct KlpInfo {
    /// The address of `klp_target_state`.
    pub target_state: Gva,
    /// The address of `klp_transition_patch`.
    pub transition_patch: Gva,
    /// `task_struct.patch_state`.
    pub patch_state: Field,
    /// `TIF_PATCH_PENDING` as a mask.
    pub pending: u64,
    /// `sizeof(struct klp_patch)`.
    pub patch_size: u64,
    /// The list heads in `struct klp_patch`, which must be initialised even when the lists are
    /// empty.
    pub patch_lists: Vec<Field>,
    /// The functions that change a task's patch state and TIF_PATCH_PENDING, with their names:
    /// while a vCPU is in one of them, the two may not match.
    pub switching: Vec<(GvaRange, &'static str)>,
    /// The static key of the hook in `__schedule` (`klp_sched_try_switch_key`), in a kernel that
    /// has it.
    pub sched_key: Option<Gva>,
}

/// The thread flags of a task.
#[derive(Clone, Copy, Debug)]
pub struct ThreadFlagInfo {
    /// `thread_info.flags`, within `task_struct`.
    pub flags: Field,
    /// `TIF_NEED_RESCHED` as a mask, if known.
    pub need_resched: Option<u64>,
    /// `TIF_NOTIFY_SIGNAL` as a mask, if known.
    pub notify_signal: Option<u64>,
}

/// Where a kernel counts the changes of its own text that are in progress.
#[derive(Clone, Debug)]
pub enum TextPokeInfo {
    /// One batch with one count.
    Batch {
        /// The address of `bp_desc.refs`.
        refs: Gva,
    },
    /// An array of changes, with a count on each CPU.
    Array {
        /// The address of `text_poke_array.nr_entries`.
        entries: Gva,
        /// The per-CPU symbol `text_poke_array_refs`.
        refs: Gva,
    },
}

/// What patching needs of a guest kernel.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    /// The guest's own livepatching; `None` in a kernel without `CONFIG_LIVEPATCH`.
    pub klp: Option<KlpInfo>,
    /// The thread flags of a task.
    pub tif: ThreadFlagInfo,
    /// Where the kernel counts changes of its text.
    pub text_poke: TextPokeInfo,
    /// The mutexes that must be free while outpatch changes what they protect, with their names.
    pub mutexes: Vec<(&'static str, Gva)>,
    /// The word of a `struct mutex` that tells whether it is held.
    pub mutex_word: LockWord,
    /// The layout of ftrace's structures.
    pub ftrace: FtraceLayout,
    /// The registered `ftrace_ops`.
    pub ftrace_ops: FtraceOps,
    /// The address of `ftrace_pages_start`.
    pub ftrace_pages: Gva,
    /// How the kernel's code reads `current`.
    pub current: CurrentVar,
    /// The address of `level2_fixmap_pgt`, the page table that maps hidden windows.
    pub fixmap_table: Gva,
    /// Where the kernel keeps its tables of modules.
    pub registration: RegistrationLayout,
}

impl KernelInfo {
    /// Resolves all of it from a kernel's symbols and types.
    ///
    /// # Errors
    /// [`PatchError::Guest`] with the name of what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<KernelInfo, PatchError> {
        let symbol = |name| kernel.symbols.address(name);
        let klp = klp(kernel)?;
        let mutexes = ["klp_mutex", "text_mutex", "ftrace_lock", "module_mutex"];
        let present = |name: &&str| *name != "klp_mutex" || klp.is_some();
        Ok(KernelInfo {
            tif: ThreadFlagInfo {
                flags: kernel.layout.task.thread_flags,
                need_resched: kernel.tif.need_resched.and_then(mask),
                notify_signal: kernel.tif.notify_signal.and_then(mask),
            },
            text_poke: text_poke(kernel)?,
            mutexes: mutexes
                .into_iter()
                .filter(present)
                .map(|name| Ok((name, symbol(name)?)))
                .collect::<Result<_, SymbolError>>()?,
            mutex_word: kernel.layout.lock.mutex,
            ftrace: FtraceLayout::new(&kernel.btf)?,
            ftrace_ops: FtraceOps::new(kernel)?,
            ftrace_pages: symbol("ftrace_pages_start")?,
            klp,
            current: current(kernel)?,
            fixmap_table: symbol("level2_fixmap_pgt")?,
            registration: RegistrationLayout::new(kernel)?,
        })
    }
}

fn mask(bit: u32) -> Option<u64> {
    1u64.checked_shl(bit)
}

fn klp(kernel: &Kernel) -> Result<Option<KlpInfo>, PatchError> {
    let Some(derived) = &kernel.livepatch else {
        return Ok(None);
    };
    let switching = ["klp_update_patch_state", "klp_copy_process"];
    Ok(Some(KlpInfo {
        target_state: derived.target_state,
        transition_patch: kernel.symbols.address("klp_transition_patch")?,
        patch_state: derived.patch_state,
        pending: mask(derived.pending_bit)
            .ok_or_else(|| unexpected("TIF_PATCH_PENDING is not a bit of a 64-bit word"))?,
        patch_size: kernel.btf.size_of("klp_patch")?,
        patch_lists: vec![
            kernel.btf.field("klp_patch.list")?,
            kernel.btf.field("klp_patch.obj_list")?,
        ],
        switching: switching
            .into_iter()
            .map(|name| Ok((kernel.symbols.range(name)?, name)))
            .collect::<Result<_, SymbolError>>()?,
        sched_key: kernel.symbols.address("klp_sched_try_switch_key").ok(),
    }))
}

fn text_poke(kernel: &Kernel) -> Result<TextPokeInfo, PatchError> {
    if let Ok(array) = kernel.symbols.address("text_poke_array") {
        return Ok(TextPokeInfo::Array {
            entries: kernel
                .btf
                .field("smp_text_poke_array.nr_entries")?
                .of(array),
            refs: kernel.symbols.address("text_poke_array_refs")?,
        });
    }
    let batch = kernel.symbols.address("bp_desc")?;
    Ok(TextPokeInfo::Batch {
        refs: kernel.btf.field("bp_patching_desc.refs")?.of(batch),
    })
}

/// How the kernel's own code reads `current`.
fn current(kernel: &Kernel) -> Result<CurrentVar, PatchError> {
    let symbol = kernel.current_variable();
    match kernel.percpu.kind {
        PerCpuKind::ImageBased => Ok(CurrentVar::RipRelative(symbol)),
        // The offset is a sign-extended displacement.
        PerCpuKind::ZeroBased => u32::try_from(symbol.0)
            .ok()
            .filter(|offset| i32::try_from(*offset).is_ok())
            .map(CurrentVar::Absolute)
            .ok_or_else(|| unexpected(format!("{symbol} is not a per-CPU offset of current_task"))),
    }
}
