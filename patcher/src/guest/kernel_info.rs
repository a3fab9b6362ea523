//! What patching needs to know of a guest kernel, resolved once: addresses, fields and bits, each by name.
//!
//! Names only; nothing here looks at what the guest does.

use introspect::kernel::LockWord;
use introspect::{Field, Gva, GvaRange, Kernel, PerCpuKind, SymbolError};

use crate::error::PatchError;
use crate::error::unexpected;
use crate::ftrace::FtraceLayout;
use crate::ftrace::ops::FtraceOps;
use crate::memory::PatchAreas;
use crate::memory::cave::TextMap;
use crate::x86::entry_stub::CurrentVar;

/// Where the guest's own livepatching keeps its state.
#[derive(Clone, Debug)]
pub struct KlpInfo {
    /// `klp_target_state`.
    pub target_state: Gva,
    /// `klp_transition_patch`.
    pub transition_patch: Gva,
    /// `task_struct.patch_state`.
    pub patch_state: Field,
    /// `TIF_PATCH_PENDING`, as a mask.
    pub pending: u64,
    /// `sizeof(struct klp_patch)`.
    pub patch_size: u64,
    /// The list heads of `struct klp_patch` that must not be left null.
    pub patch_lists: Vec<Field>,
    /// Code during which a task's state and flag do not belong together.
    pub switching: Vec<(GvaRange, &'static str)>,
    /// The static key of the hook in `__schedule`, in a kernel that has it.
    pub sched_key: Option<Gva>,
}

/// How a task is told that something is to be done.
#[derive(Clone, Copy, Debug)]
pub struct ThreadFlagInfo {
    /// `thread_info.flags`, within `task_struct`.
    pub flags: Field,
    /// `TIF_NEED_RESCHED`, as a mask, where it is known.
    pub need_resched: Option<u64>,
    /// `TIF_NOTIFY_SIGNAL`, as a mask, where it is known.
    pub notify_signal: Option<u64>,
}

/// How a kernel says that it is changing its own text.
#[derive(Clone, Debug)]
pub enum TextPokeInfo {
    /// One batch, counted by `bp_desc.refs`.
    Batch {
        /// The count.
        refs: Gva,
    },
    /// `text_poke_array`, with a count on each CPU.
    Array {
        /// `text_poke_array.nr_entries`.
        entries: Gva,
        /// The per-CPU symbol of the count.
        refs: Gva,
    },
}

/// All of it.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    /// The guest's own livepatching; a kernel without `CONFIG_LIVEPATCH` has none.
    pub klp: Option<KlpInfo>,
    /// Flags of a task.
    pub tif: ThreadFlagInfo,
    /// Text poking.
    pub poke: TextPokeInfo,
    /// Mutexes that must be free while we change what they protect, with their names.
    pub mutexes: Vec<(&'static str, Gva)>,
    /// How a mutex says that it is held.
    pub mutex: LockWord,
    /// ftrace's types.
    pub ftrace: FtraceLayout,
    /// Who traces.
    pub tracers: FtraceOps,
    /// `ftrace_pages_start`.
    pub ftrace_pages: Gva,
    /// How code finds `current`.
    pub current: CurrentVar,
    /// Where patches may lie.
    pub areas: PatchAreas,
}

impl KernelInfo {
    /// From a kernel's symbols and types.
    ///
    /// # Errors
    /// [`PatchError::Guest`] naming what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<KernelInfo, PatchError> {
        let symbol = |name| kernel.symbols.address(name);
        let klp = klp(kernel)?;
        let mutexes = ["klp_mutex", "text_mutex", "ftrace_lock"];
        let there = |name: &&str| *name != "klp_mutex" || klp.is_some();
        let srso = ["srso_alias_untrain_ret", "srso_alias_safe_ret"];
        Ok(KernelInfo {
            tif: ThreadFlagInfo {
                flags: kernel.layout.task.thread_flags,
                need_resched: kernel.tif.need_resched.and_then(mask),
                notify_signal: kernel.tif.notify_signal.and_then(mask),
            },
            poke: poke(kernel)?,
            mutexes: mutexes
                .into_iter()
                .filter(there)
                .map(|name| Ok((name, symbol(name)?)))
                .collect::<Result<_, SymbolError>>()?,
            mutex: kernel.layout.lock.mutex,
            ftrace: FtraceLayout::new(&kernel.btf)?,
            tracers: FtraceOps::new(kernel)?,
            ftrace_pages: symbol("ftrace_pages_start")?,
            klp,
            current: current(kernel)?,
            areas: PatchAreas {
                fixmap_table: symbol("level2_fixmap_pgt")?,
                text: TextMap {
                    text: kernel.text.core,
                    entry: kernel.text.entry,
                    srso: srso
                        .into_iter()
                        .filter_map(|name| symbol(name).ok())
                        .collect(),
                },
            },
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
            .ok_or_else(|| unexpected("TIF_PATCH_PENDING is no bit of 64"))?,
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

fn poke(kernel: &Kernel) -> Result<TextPokeInfo, PatchError> {
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

/// `current`, the way that the kernel's own code reads it.
fn current(kernel: &Kernel) -> Result<CurrentVar, PatchError> {
    let symbol = kernel.current_variable();
    match kernel.percpu.kind {
        PerCpuKind::ImageBased => Ok(CurrentVar::RipRelative(symbol)),
        // The offset is a sign-extended displacement.
        PerCpuKind::ZeroBased => u32::try_from(symbol.0)
            .ok()
            .filter(|offset| i32::try_from(*offset).is_ok())
            .map(CurrentVar::Absolute)
            .ok_or_else(|| unexpected(format!("{symbol} is no per-CPU offset of current_task"))),
    }
}
