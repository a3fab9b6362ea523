//! `Kernel`: everything about a guest's kernel that is fixed once it has booted, found in one
//! pause.
//!
//! This module puts the parts together and cross-checks them. How each part is found is the
//! business of its own module.

mod halted;
mod in_use;
mod kallsyms_search;
mod klp;
mod layout;
mod locate;
mod percpu;
mod stack_areas;
mod tif;

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::btf::{Btf, BtfError};
use crate::kernel::kallsyms_search::Search;
use crate::kernel::locate::{Candidate, IMAGE_RANGE};
use crate::memory::PhysMemory;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::memory::paging::AddressSpace;
use crate::symbols::kallsyms::KallsymsError;
use crate::symbols::{Symbol, SymbolError, Symbols};
use crate::vcpu::VcpuRegs;

pub use halted::is_halted_permanently;
pub use klp::{KlpError, KlpState};
pub use layout::{
    ExportsLayout, Extent, Layout, LockLayout, LockWord, ModuleLayout, ModuleMemoryLayout,
    ModuleOrcLayout, ModuleSymbolsLayout, SignalLayout, TaskLayout,
};
pub use percpu::{PerCpu, PerCpuError, PerCpuKind};
pub use stack_areas::{StackArea, StackAreaError, StackAreas, StackType};
pub use tif::ThreadFlags;

pub(crate) use stack_areas::MAX_STACK;

/// The most bytes of vmcoreinfo that are read; the kernel has one page of it
/// (`include/linux/vmcore_info.h: VMCOREINFO_BYTES`).
const MAX_VMCOREINFO: usize = 64 << 10;
/// The most bytes of BTF that are read; the largest of a stock kernel has 7 MiB.
const MAX_BTF: usize = 16 << 20;
/// The most bytes of `linux_banner` that are read.
const MAX_BANNER: usize = 512;

/// A guest's kernel. Valid until the guest is reset.
#[derive(Debug)]
pub struct Kernel {
    /// `_text`: the virtual address at which the kernel image begins.
    pub base: Gva,
    /// The physical address of the same; the whole image is contiguous there.
    pub phys: GuestAddress,
    /// The kernel's `phys_base`: added to a distance from `__START_KERNEL_map`, it gives a physical
    /// address, modulo 2^64.
    pub phys_base: u64,
    /// The kernel's own page tables (`init_top_pgt`). Unlike a task's, they always exist.
    pub space: AddressSpace,
    /// The kernel's banner, `Linux version …`, without its line end.
    pub banner: String,
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// The symbols of the core kernel, without those of modules.
    pub symbols: Symbols,
    /// The types of the core kernel, without those of modules.
    pub btf: Btf,
    /// Where the fields lie that are read of the kernel's structures.
    pub layout: Layout,
    /// Where each CPU keeps its per-CPU variables.
    pub percpu: PerCpu,
    /// Where the kernel keeps its livepatch state; `None` without `CONFIG_LIVEPATCH`.
    pub livepatch: Option<KlpState>,
    /// The numbers of TIF bits that BTF does not have.
    pub tif: ThreadFlags,
    /// Where the core kernel's code lies.
    pub text: TextRanges,
    /// Where the stacks lie, or why that is not known.
    stack_areas: Result<StackAreas, StackAreaError>,
    /// The per-CPU variable that points to the current task of a CPU.
    current: Gva,
    /// A value that is random for each boot, and its address: the stack canary of the boot CPU's
    /// idle task, where the kernel has one.
    boot_canary: Option<(Gva, u64)>,
}

/// The ranges of the core kernel's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextRanges {
    /// `[_stext, _etext)`: all code but that of initialization.
    pub core: GvaRange,
    /// `[_sinittext, _einittext)`: initialization code. It is freed after boot, but is still on the
    /// stack of `swapper/0`.
    pub init: GvaRange,
    /// `[__entry_text_start, __entry_text_end)`: kernel entry and exit.
    pub entry: GvaRange,
    /// `[__sched_text_start, __sched_text_end)`: the scheduler, which `/proc/PID/stack` leaves out.
    pub sched: GvaRange,
}

/// Why no kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The guest has not finished booting: try again later.
    #[error("the guest's kernel is not up yet: {0}")]
    NotReady(#[source] NotReady),
    /// There is a kernel image, but no symbol table in it.
    #[error("kernel image at {base}: {source}")]
    Kallsyms {
        /// The virtual address of the image.
        base: Gva,
        /// The table that is missing.
        source: KallsymsError,
    },
    /// A symbol that every kernel has is missing.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The kernel's types cannot be read, or lack something.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// Memory that every kernel has cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Per-CPU variables cannot be located.
    #[error(transparent)]
    PerCpu(#[from] PerCpuError),
    /// The kernel has livepatching, but its code is not as expected.
    #[error(transparent)]
    Klp(#[from] KlpError),
    /// The kernel's variables and the page tables disagree on an address.
    #[error(
        "inconsistent guest: \
         {what} is {found:#x} in its variables, {expected:#x} in its page tables"
    )]
    Contradiction {
        /// The address that they disagree on.
        what: &'static str,
        /// The value in the kernel's variables.
        found: u64,
        /// The value by the page tables.
        expected: u64,
    },
}

/// Why a guest has no kernel to introspect yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// No vCPU's registers lead to a kernel image: the guest runs firmware, the decompressor, or
    /// the kernel's first instructions.
    #[error("no vCPU's registers lead to a kernel image")]
    NoImage,
    /// There is an image, but its `system_state`, given here, is before `SYSTEM_RUNNING`.
    #[error("still booting (system_state is {0})")]
    Booting(u32),
}

impl Kernel {
    /// Finds the kernel, from memory and the registers of stopped vCPUs alone.
    ///
    /// Reads the kernel image from end to end, and its types. All that is kept is fixed once the
    /// guest runs (`system_state` is `SYSTEM_RUNNING`), so no lock matters. The vCPUs may run
    /// during the call, as long as one of the page tables that their registers name remains. Linear
    /// in the image: hundreds of milliseconds for a stock kernel.
    ///
    /// Where the guest has started another kernel (kexec), that one is found as long as a vCPU runs
    /// it: vCPUs that are halted permanently count only if there are no others.
    ///
    /// # Errors
    /// [`FindError::NotReady`] when the guest has not booted; any other when its kernel is not
    /// understood.
    pub fn find(phys: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Result<Kernel, FindError> {
        let mut error = FindError::NotReady(NotReady::NoImage);
        let mut search = Search::new();
        for candidate in locate::candidates(phys, vcpus) {
            match Kernel::at(phys, candidate, &mut search) {
                Ok(kernel) => return Ok(kernel),
                Err(found) => {
                    tracing::debug!(base = %candidate.base, error = %found, "no kernel here");
                    error = found;
                }
            }
        }
        Err(error)
    }

    fn at(
        phys: &dyn PhysMemory,
        candidate: Candidate,
        search: &mut Search,
    ) -> Result<Kernel, FindError> {
        let base = candidate.base;
        let symbols = search
            .symbols(phys, candidate)
            .map_err(|error| FindError::Kallsyms {
                base,
                source: error,
            })?;
        let space = space(phys, candidate, &symbols)?;
        let memory = KernelMemory::new(phys, space);
        let phys_base = phys_base(candidate, &symbols, &memory)?;
        let btf = btf(&symbols, &memory)?;
        check_running(&symbols, &btf, &memory)?;
        let layout = Layout::resolve(&btf)?;
        let banner = memory.cstr(symbols.address("linux_banner")?, MAX_BANNER)?;
        let current = match symbols.address("pcpu_hot") {
            Ok(hot) => btf.field("pcpu_hot.current_task")?.of(hot),
            Err(_) => symbols.address("current_task")?,
        };
        let boot_canary = boot_canary(&symbols, &layout, &memory);
        let percpu = PerCpu::find(&symbols, &memory)?;
        Ok(Kernel {
            boot_canary,
            stack_areas: StackAreas::resolve(&symbols, &btf, &percpu),
            base: candidate.base,
            phys: candidate.phys,
            phys_base,
            space,
            release: release(&banner),
            banner: banner.trim_end().to_owned(),
            percpu,
            livepatch: KlpState::find(&symbols, &layout, &memory)?,
            tif: ThreadFlags::find(&symbols, &memory),
            text: TextRanges::find(&symbols)?,
            symbols,
            btf,
            layout,
            current,
        })
    }

    /// The kernel's virtual memory. Valid for one pause.
    #[must_use]
    pub fn memory<'m>(&self, phys: &'m dyn PhysMemory) -> KernelMemory<'m> {
        KernelMemory::new(phys, self.space)
    }

    /// The symbol of the core kernel that `gva` belongs to, and the offset into it. Reads nothing
    /// from the guest; a binary search.
    #[must_use]
    pub fn symbolize(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        self.symbols.at(gva)
    }

    /// What the kernel keeps for readers of its crash dumps (`kernel/crash_core.c:
    /// vmcoreinfo_data`): lines of `NAME=VALUE`. `None` for a kernel without crash dumps.
    #[must_use]
    pub fn vmcoreinfo(&self, memory: &KernelMemory<'_>) -> Option<Vec<u8>> {
        let data = memory
            .pointer(self.symbols.address("vmcoreinfo_data").ok()?)
            .ok()?;
        let size = memory
            .u64(self.symbols.address("vmcoreinfo_size").ok()?)
            .ok()?;
        memory.bytes(data, size, MAX_VMCOREINFO).ok()
    }

    /// Whether `gva` is code of the core kernel (`core_kernel_text`, init text included).
    #[must_use]
    pub fn is_text(&self, gva: Gva) -> bool {
        self.text.core.contains(gva) || self.text.init.contains(gva)
    }

    /// The physical address of an address in the image; `None` outside the image.
    #[must_use]
    pub fn image_to_phys(&self, gva: Gva) -> Option<GuestAddress> {
        self.symbols
            .image()
            .contains(gva)
            .then(|| GuestAddress(self.phys.0.wrapping_add(gva.since(self.base))))
    }

    /// Where this kernel's stacks lie.
    pub(crate) fn stack_areas(&self) -> Result<&StackAreas, StackAreaError> {
        self.stack_areas.as_ref().map_err(Clone::clone)
    }

    /// The per-CPU variable that points to a CPU's current task: a symbol as [`PerCpu::address`]
    /// takes it.
    #[must_use]
    pub fn current_variable(&self) -> Gva {
        self.current
    }

    /// The task that `cpu` runs, by its own variable.
    ///
    /// # Errors
    /// [`ReadError`], also for a CPU that is not possible.
    pub fn current_task(&self, memory: &KernelMemory<'_>, cpu: u32) -> Result<Gva, ReadError> {
        // A CPU that is not possible has no per-CPU area.
        let variable = self.percpu.address(self.current, cpu).unwrap_or(Gva::NULL);
        memory.pointer(variable)
    }
}

impl TextRanges {
    fn find(symbols: &Symbols) -> Result<TextRanges, SymbolError> {
        Ok(TextRanges {
            core: symbols.between("_stext", "_etext")?,
            init: symbols.between("_sinittext", "_einittext")?,
            entry: symbols.between("__entry_text_start", "__entry_text_end")?,
            sched: symbols.between("__sched_text_start", "__sched_text_end")?,
        })
    }
}

/// The kernel's own page tables, after a check that they map the image where the vCPU's do.
fn space(
    phys: &dyn PhysMemory,
    candidate: Candidate,
    symbols: &Symbols,
) -> Result<AddressSpace, FindError> {
    let distance = symbols.address("init_top_pgt")?.since(candidate.base);
    let space = AddressSpace {
        root: GuestAddress(candidate.phys.0.wrapping_add(distance)),
        ..candidate.space
    };
    let mapping = KernelMemory::new(phys, space).translate(candidate.base)?;
    if mapping.gpa != candidate.phys {
        return Err(FindError::Contradiction {
            what: "the physical address of _text",
            found: mapping.gpa.0,
            expected: candidate.phys.0,
        });
    }
    Ok(space)
}

fn phys_base(
    candidate: Candidate,
    symbols: &Symbols,
    memory: &KernelMemory<'_>,
) -> Result<u64, FindError> {
    let expected = candidate
        .phys
        .0
        .wrapping_sub(candidate.base.since(IMAGE_RANGE.start));
    let found = memory.u64(symbols.address("phys_base")?)?;
    if found != expected {
        return Err(FindError::Contradiction {
            what: "phys_base",
            found,
            expected,
        });
    }
    Ok(found)
}

fn btf(symbols: &Symbols, memory: &KernelMemory<'_>) -> Result<Btf, FindError> {
    let range = symbols.between("__start_BTF", "__stop_BTF")?;
    Ok(Btf::parse(memory.bytes(
        range.start,
        range.len(),
        MAX_BTF,
    )?)?)
}

/// Fails before `SYSTEM_RUNNING`: until then code is still being patched and freed, and there may
/// be only one task.
fn check_running(symbols: &Symbols, btf: &Btf, memory: &KernelMemory<'_>) -> Result<(), FindError> {
    let state = memory.u32(symbols.address("system_state")?)?;
    if i64::from(state) < btf.enum_value("SYSTEM_RUNNING")? {
        return Err(FindError::NotReady(NotReady::Booting(state)));
    }
    Ok(())
}

/// The address and value of the boot CPU's idle task's stack canary.
fn boot_canary(
    symbols: &Symbols,
    layout: &Layout,
    memory: &KernelMemory<'_>,
) -> Option<(Gva, u64)> {
    let at = layout
        .task
        .stack_canary?
        .of(symbols.address("init_task").ok()?);
    Some((at, memory.u64(at).ok()?))
}

/// The third word of the banner: `Linux version RELEASE (…`.
fn release(banner: &str) -> String {
    let mut words = banner.split_whitespace();
    words.nth(2).unwrap_or_default().to_owned()
}
