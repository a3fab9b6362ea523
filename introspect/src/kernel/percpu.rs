//! Per-CPU variables: which CPUs can be, and where each keeps its own.
//!
//! A variable of CPU n lies at `__per_cpu_offset[n]` + symbol, modulo 2^64, in every generation: up to 6.14 the symbols are
//! small numbers, later they are addresses in the image (`arch/x86/include/asm/percpu.h`). Entries of CPUs that can never be
//! are not 0 everywhere, so the mask of possible CPUs decides.

use crate::addr::Gva;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::symbols::{SymbolError, Symbols};

/// `NR_CPUS` of the largest kernels.
const MAX_CPUS: u32 = 8192;

/// What a per-CPU variable's symbol is, and so how the kernel's code addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerCpuKind {
    /// An offset in the area: code says `%gs:offset`.
    ZeroBased,
    /// An address in the image: code says `%gs:symbol(%rip)`.
    ImageBased,
}

/// Why per-CPU variables cannot be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PerCpuError {
    /// A symbol is missing.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The tables cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The mask of possible CPUs is empty.
    #[error("the guest kernel says that it has no CPU")]
    NoCpu,
}

/// Where each CPU keeps its variables. Fixed once the guest has booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerCpu {
    /// How symbols are to be read.
    pub kind: PerCpuKind,
    /// Possible CPUs, rising.
    cpus: Vec<u32>,
    /// `__per_cpu_offset` of each of them.
    offsets: Vec<u64>,
    /// `__cpu_online_mask`, and its bytes.
    online_mask: (Gva, u64),
}

impl PerCpu {
    pub(crate) fn find(
        symbols: &Symbols,
        memory: &KernelMemory<'_>,
    ) -> Result<PerCpu, PerCpuError> {
        let kind = if symbols.address("__per_cpu_start")?.is_null() {
            PerCpuKind::ZeroBased
        } else {
            PerCpuKind::ImageBased
        };
        let table = symbols.range("__per_cpu_offset")?;
        let room = table.len() / 8;
        let possible = symbols.range("__cpu_possible_mask")?;
        let cpus: Vec<u32> = set_bits(memory, (possible.start, possible.len()))?
            .into_iter()
            .filter(|&cpu| u64::from(cpu) < room)
            .collect();
        if cpus.is_empty() {
            return Err(PerCpuError::NoCpu);
        }
        let offsets = cpus
            .iter()
            .map(|&cpu| memory.u64(table.start.add(8 * u64::from(cpu))))
            .collect::<Result<_, _>>()?;
        let online = symbols.range("__cpu_online_mask")?;
        Ok(PerCpu {
            kind,
            cpus,
            offsets,
            online_mask: (online.start, online.len()),
        })
    }

    /// The CPUs that can be (`cpu_possible_mask`), rising.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.cpus
    }

    /// The CPUs that are on now (`cpu_online_mask`), rising. One bit each, which changes at once: no lock is needed.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn online(&self, memory: &KernelMemory<'_>) -> Result<Vec<u32>, ReadError> {
        let mut cpus = set_bits(memory, self.online_mask)?;
        cpus.retain(|cpu| self.cpus.binary_search(cpu).is_ok());
        Ok(cpus)
    }

    /// `__per_cpu_offset` of a possible CPU: the base of its GS, too.
    #[must_use]
    pub fn offset(&self, cpu: u32) -> Option<u64> {
        let index = self.cpus.binary_search(&cpu).ok()?;
        self.offsets.get(index).copied()
    }

    /// Where `cpu` keeps the variable whose symbol is `variable`; `None` for a CPU that cannot be.
    #[must_use]
    pub fn address(&self, variable: Gva, cpu: u32) -> Option<Gva> {
        Some(variable.add(self.offset(cpu)?))
    }

    /// The CPU whose per-CPU base this is.
    #[must_use]
    pub fn cpu_of_gs(&self, base: u64) -> Option<u32> {
        let index = self.offsets.iter().position(|&offset| offset == base)?;
        self.cpus.get(index).copied()
    }
}

/// The numbers of the bits that are set in a `struct cpumask`.
fn set_bits(memory: &KernelMemory<'_>, (mask, bytes): (Gva, u64)) -> Result<Vec<u32>, ReadError> {
    // Behind the mask comes whatever symbol is next: never look further than the largest mask there is.
    let bytes = bytes.min(u64::from(MAX_CPUS) / 8);
    let raw = memory.bytes(mask, bytes, MAX_CPUS as usize / 8)?;
    let bytes = raw.iter().zip((0u32..).step_by(8));
    let of_byte = |(byte, first): (&u8, u32)| {
        let byte = *byte;
        let bits = (0..8).filter(move |bit| byte >> bit & 1 != 0);
        bits.map(move |bit| first + bit)
    };
    // Almost all of it is zero: `NR_CPUS` is for the largest machine there is.
    let some = bytes.filter(|(byte, _)| **byte != 0);
    Ok(some.flat_map(of_byte).collect())
}
