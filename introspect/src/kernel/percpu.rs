//! Per-CPU variables: which CPUs are possible, and where each keeps its own.
//!
//! A variable of CPU n lies at `__per_cpu_offset[n]` + symbol, modulo 2^64, in every generation: up
//! to 6.14 the symbols are small numbers, later they are addresses in the image
//! (`arch/x86/include/asm/percpu.h`). The entries of CPUs that are not possible are not always 0,
//! so the mask of possible CPUs decides.

use crate::addr::Gva;
use crate::memory::kernel::{KernelMemory, ReadError};
use crate::symbols::{SymbolError, Symbols};

/// `NR_CPUS` of the largest kernels: no mask has more bits.
const MAX_CPUS: u32 = 8192;

/// What the symbol of a per-CPU variable is, which decides how the kernel's code addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PerCpuKind {
    /// An offset in the area: code says `%gs:offset`.
    ZeroBased,
    /// An address in the image: code says `%gs:symbol(%rip)`.
    ImageBased,
}

/// Why per-CPU variables cannot be located.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PerCpuError {
    /// A symbol is missing.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The offsets or masks cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The mask of possible CPUs is empty.
    #[error("the guest kernel has no possible CPU")]
    NoCpu,
}

/// Where each CPU keeps its per-CPU variables. Fixed once the guest has booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerCpu {
    /// What the symbols of per-CPU variables are.
    pub kind: PerCpuKind,
    /// Possible CPUs, in ascending order.
    cpus: Vec<u32>,
    /// The `__per_cpu_offset` of each of them.
    offsets: Vec<u64>,
    /// The address of `__cpu_online_mask`, and its size in bytes.
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
        let max_cpus = table.len() / 8;
        let possible = symbols.range("__cpu_possible_mask")?;
        let cpus: Vec<u32> = set_bits(memory, (possible.start, possible.len()))?
            .into_iter()
            .filter(|&cpu| u64::from(cpu) < max_cpus)
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

    /// The possible CPUs (`cpu_possible_mask`), in ascending order.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.cpus
    }

    /// The CPUs that are online (`cpu_online_mask`), in ascending order. Each is one bit, which
    /// changes at once, so no lock is needed.
    ///
    /// # Errors
    /// [`ReadError`] when the mask cannot be read.
    pub fn online(&self, memory: &KernelMemory<'_>) -> Result<Vec<u32>, ReadError> {
        let mut cpus = set_bits(memory, self.online_mask)?;
        cpus.retain(|cpu| self.cpus.binary_search(cpu).is_ok());
        Ok(cpus)
    }

    /// The `__per_cpu_offset` of a possible CPU, which is also its kernel GS base; `None` for any
    /// other.
    #[must_use]
    pub fn offset(&self, cpu: u32) -> Option<u64> {
        let index = self.cpus.binary_search(&cpu).ok()?;
        self.offsets.get(index).copied()
    }

    /// The address at which `cpu` keeps the variable whose symbol is `variable`; `None` for a CPU
    /// that is not possible.
    #[must_use]
    pub fn address(&self, variable: Gva, cpu: u32) -> Option<Gva> {
        Some(variable.add(self.offset(cpu)?))
    }

    /// The CPU whose kernel GS base is `base`.
    #[must_use]
    pub fn cpu_of_gs(&self, base: u64) -> Option<u32> {
        let index = self.offsets.iter().position(|&offset| offset == base)?;
        self.cpus.get(index).copied()
    }
}

/// The numbers of the bits that are set in a `struct cpumask`.
fn set_bits(memory: &KernelMemory<'_>, (mask, bytes): (Gva, u64)) -> Result<Vec<u32>, ReadError> {
    // After the mask comes another symbol: never read more than the largest mask there is.
    let bytes = bytes.min(u64::from(MAX_CPUS) / 8);
    let raw = memory.bytes(mask, bytes, MAX_CPUS as usize / 8)?;
    let bytes = raw.iter().zip((0u32..).step_by(8));
    let of_byte = |(byte, first): (&u8, u32)| {
        let byte = *byte;
        let bits = (0..8).filter(move |bit| byte >> bit & 1 != 0);
        bits.map(move |bit| first + bit)
    };
    // Almost all bytes are zero: `NR_CPUS` is for the largest machine.
    let some = bytes.filter(|(byte, _)| **byte != 0);
    Ok(some.flat_map(of_byte).collect())
}
