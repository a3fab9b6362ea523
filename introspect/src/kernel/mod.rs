//! A guest's kernel: everything that is fixed once it has booted, found in one pause.
//!
//! Puts the parts together and cross-checks them; how each is found, its own module knows.

mod kallsyms_search;
pub mod klp;
pub mod layout;
pub mod locate;
pub mod percpu;
pub mod stack_areas;
pub mod tif;

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::btf::{Btf, BtfError};
use crate::kernel::kallsyms_search::Search;
use crate::kernel::klp::{KlpState, LivepatchError};
use crate::kernel::layout::Layout;
use crate::kernel::locate::{Candidate, IMAGE_WINDOW};
use crate::kernel::percpu::{PerCpu, PerCpuError};
use crate::kernel::stack_areas::{StackAreaError, StackAreas};
use crate::kernel::tif::ThreadFlags;
use crate::memory::PhysMemory;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::memory::paging::AddressSpace;
use crate::symbols::kallsyms::KallsymsError;
use crate::symbols::{Symbol, SymbolError, Symbols};
use crate::vcpu::VcpuRegs;

/// It has a page (`include/linux/vmcore_info.h: VMCOREINFO_BYTES`).
const MAX_VMCOREINFO: usize = 64 << 10;
/// The largest BTF of a stock kernel has 7 MiB.
const MAX_BTF: usize = 16 << 20;
const MAX_BANNER: usize = 512;

/// A guest's kernel. Good as long as the guest is not reset.
#[derive(Debug)]
pub struct Kernel {
    /// `_text`, where the image begins in virtual memory.
    pub base: Gva,
    /// The same in physical memory; the whole image is contiguous there.
    pub phys: GuestAddress,
    /// The kernel's `phys_base`: what added to a distance from `__START_KERNEL_map` gives a physical address, modulo 2^64.
    pub phys_base: u64,
    /// The kernel's own tables (`init_top_pgt`): unlike a task's, always there.
    pub space: AddressSpace,
    /// `Linux version …`, without its line end.
    pub banner: String,
    /// As `uname -r` says it.
    pub release: String,
    /// Symbols of the core kernel.
    pub symbols: Symbols,
    /// Types of the core kernel.
    pub btf: Btf,
    /// Fields of the structures that are read.
    pub layout: Layout,
    /// Per-CPU areas.
    pub percpu: PerCpu,
    /// What livepatching needs; `None` for a kernel without it.
    pub livepatch: Option<KlpState>,
    /// TIF bits.
    pub tif: ThreadFlags,
    /// Where the core kernel's code is.
    pub text: TextRanges,
    /// Where stacks are.
    places: Result<StackAreas, StackAreaError>,
    /// How to find the current task of a CPU: the per-CPU variable that points to it.
    current: Gva,
    /// Random since this boot, where the kernel has it: the stack canary of the boot CPU's idle task.
    boot_canary: Option<(Gva, u64)>,
}

/// Where the core kernel's code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextRanges {
    /// `[_stext, _etext)`.
    pub core: GvaRange,
    /// `[_sinittext, _einittext)`: given back after boot, but still on the stack of `swapper/0`.
    pub init: GvaRange,
    /// `[__entry_text_start, __entry_text_end)`: entry from and exit to user mode.
    pub entry: GvaRange,
    /// `[__sched_text_start, __sched_text_end)`: the scheduler, left out of `/proc/PID/stack`.
    pub sched: GvaRange,
}

/// Why no kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The guest has not booted so far: try again later.
    #[error("the guest's kernel is not up yet: {0}")]
    NotReady(NotReady),
    /// An image, but no symbols in it.
    #[error("kernel image at {base}: {error}")]
    Kallsyms {
        /// Where the image is.
        base: Gva,
        /// What is missing.
        error: KallsymsError,
    },
    /// A symbol that every kernel has is missing.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The kernel's types cannot be read, or lack something.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// Memory that the kernel must have cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Per-CPU variables cannot be found.
    #[error(transparent)]
    PerCpu(#[from] PerCpuError),
    /// Livepatching cannot be understood.
    #[error(transparent)]
    KlpState(#[from] LivepatchError),
    /// Two ways to the same thing lead to different places.
    #[error(
        "the guest contradicts itself: {what} is {found:#x} by its own word, {expected:#x} by its page tables"
    )]
    Contradiction {
        /// What.
        what: &'static str,
        /// What the kernel's variable says.
        found: u64,
        /// What the page tables say.
        expected: u64,
    },
}

/// How far the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// No vCPU's registers lead to a kernel image: firmware, decompressor, or the first instructions.
    #[error("no vCPU shows a kernel image")]
    NoImage,
    /// The image is there, but its `system_state` is before `SYSTEM_RUNNING`.
    #[error("still booting (system_state is {0})")]
    Booting(u32),
}

impl Kernel {
    /// Finds the kernel from memory and the registers of stopped vCPUs alone.
    ///
    /// Reads the kernel's image from end to end, and its types. All that it keeps is fixed once the guest runs
    /// (`system_state` is `SYSTEM_RUNNING`), so it depends on no lock; the vCPUs may run on while it reads, if one of the page tables that
    /// their registers name stays. Linear in the image: hundreds of milliseconds for a stock kernel. Good as long as the guest is not reset.
    ///
    /// # Errors
    /// [`FindError::NotReady`] when it is too early; any other when it is no kernel that we understand.
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
            .map_err(|error| FindError::Kallsyms { base, error })?;
        let space = space(phys, candidate, &symbols)?;
        let memory = KernelMemory::new(phys, space);
        let phys_base = phys_base(candidate, &symbols, &memory)?;
        let btf = btf(&symbols, &memory)?;
        ready(&symbols, &btf, &memory)?;
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
            places: StackAreas::resolve(&symbols, &btf, &percpu),
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

    /// Whether nothing shows that the guest runs another kernel than this one, of this boot: it can start one by itself (kexec). The
    /// old one may lie untouched in memory then, but no vCPU enters it any more. A few reads, no lock.
    #[must_use]
    pub fn is_running(&self, memory: &KernelMemory<'_>, vcpus: &[VcpuRegs]) -> bool {
        let same_boot = self
            .boot_canary
            .is_none_or(|(at, mark)| memory.u64(at) == Ok(mark));
        let banner = self.symbols.address("linux_banner").ok();
        let banner = banner.and_then(|at| memory.cstr(at, MAX_BANNER).ok());
        let mut online = vcpus.iter().filter(|vcpu| vcpu.online && !vcpu.foreign);
        same_boot
            && banner.is_some_and(|banner| banner.trim_end() == self.banner)
            && online.all(|vcpu| self.may_be_run_by(memory, vcpu))
    }

    /// Whether a vCPU's system calls lead into this kernel, and its tables, where they map it, to this image.
    fn may_be_run_by(&self, memory: &KernelMemory<'_>, vcpu: &VcpuRegs) -> bool {
        let entry = self.symbols.address("entry_SYSCALL_64");
        // Without a system call entry, as early in boot and with FRED, a vCPU says nothing.
        let enters = vcpu.lstar == 0 || entry.is_ok_and(|entry| entry.0 == vcpu.lstar);
        let Some(space) = AddressSpace::of_vcpu(vcpu) else {
            return enters;
        };
        let mut images = [space.kernel_half(), space]
            .into_iter()
            .filter_map(|space| space.translate(memory.phys(), self.base).ok())
            .map(|mapping| mapping.gpa)
            .peekable();
        enters && (images.peek().is_none() || images.any(|image| image == self.phys))
    }

    /// The kernel's virtual memory, for one pause.
    #[must_use]
    pub fn memory<'m>(&self, phys: &'m dyn PhysMemory) -> KernelMemory<'m> {
        KernelMemory::new(phys, self.space)
    }

    /// The core kernel's symbol that `gva` belongs to and the offset into it. Reads nothing; a binary search.
    #[must_use]
    pub fn symbolize(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        self.symbols.at(gva)
    }

    /// What the kernel has written down for readers of its crash dumps (`kernel/crash_core.c: vmcoreinfo_data`): lines of
    /// `NAME=VALUE`. `None` for a kernel that cannot crash-dump.
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

    /// Where an address in the image is in physical memory; `None` for one outside it.
    #[must_use]
    pub fn image_to_phys(&self, gva: Gva) -> Option<GuestAddress> {
        self.symbols
            .image()
            .contains(gva)
            .then(|| GuestAddress(self.phys.0.wrapping_add(gva.since(self.base))))
    }

    /// Where this kernel's stacks are.
    pub(crate) fn places(&self) -> Result<&StackAreas, StackAreaError> {
        self.places.as_ref().map_err(Clone::clone)
    }

    /// The per-CPU variable that points to a CPU's current task: a symbol in the sense of [`PerCpu::address`].
    #[must_use]
    pub fn current_variable(&self) -> Gva {
        self.current
    }

    /// The task that `cpu` says it runs.
    ///
    /// # Errors
    /// [`ReadError`]; also for a CPU that cannot be.
    pub fn current_task(&self, memory: &KernelMemory<'_>, cpu: u32) -> Result<Gva, ReadError> {
        // A CPU that cannot be has no area: its variable is nowhere.
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

/// The kernel's own tables, checked to map the image where the vCPU's do.
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
        .wrapping_sub(candidate.base.since(IMAGE_WINDOW.start));
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

/// Before `SYSTEM_RUNNING` code is still being patched and given back, and there may be one task.
fn ready(symbols: &Symbols, btf: &Btf, memory: &KernelMemory<'_>) -> Result<(), FindError> {
    let state = memory.u32(symbols.address("system_state")?)?;
    if i64::from(state) < btf.enum_value("SYSTEM_RUNNING")? {
        return Err(FindError::NotReady(NotReady::Booting(state)));
    }
    Ok(())
}

/// `Linux version RELEASE (…`.
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

fn release(banner: &str) -> String {
    let mut words = banner.split_whitespace();
    words.nth(2).unwrap_or_default().to_owned()
}
