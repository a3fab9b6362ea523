//! Which `ftrace_ops` cover a function, from ftrace's own list of them and their filter hashes.
//!
//! An `ftrace_ops` that is registered while ftrace leaves an entry alone (see
//! [`site`](crate::ftrace::site)) is not counted in the entry's record. When the entry is enabled
//! again, the record must have the count that it would have had: ftrace that finds a count too low,
//! when one of them is unregistered, warns and disables itself. This module follows
//! `kernel/trace/ftrace.c: referenced_filters, ops_references_ip, ftrace_hash_rec_update`.
//!
//! This module must not know what bytes are at an entry.

use introspect::SymbolError;
use introspect::btf::{Btf, BtfError};
use introspect::memory::{Field, KernelMemory, ReadError};
use introspect::{Gva, Kernel};

/// The most steps, from one `ftrace_ops` to the next or along a chain of a hash. No kernel needs as
/// many: a walk that does is in a cycle.
const MAX_STEPS: u32 = 1 << 18;
/// The most `size_bits` of a hash: more than any of ftrace's has (`FTRACE_HASH_MAX_BITS`).
const MAX_HASH_BITS: u64 = 20;
/// `include/linux/hash.h: GOLDEN_RATIO_64`.
const GOLDEN_RATIO: u64 = 0x61c8_8646_80b5_83eb;

/// ftrace's list of `ftrace_ops`, and how to read it.
#[derive(Clone, Copy, Debug)]
pub struct FtraceOps {
    /// `ftrace_ops_list`.
    head: Gva,
    /// `ftrace_list_end`.
    end: Gva,
    next: Field,
    flags: Field,
    func_hash: Field,
    trampoline: Field,
    filter: Field,
    notrace: Field,
    hash: HashLayout,
    bits: Bits,
}

/// Layout of `struct ftrace_hash`.
#[derive(Clone, Copy, Debug)]
struct HashLayout {
    size_bits: Field,
    buckets: Field,
    count: Field,
    flags: Field,
    /// `FTRACE_HASH_FL_MOD`: the hash is not empty, even if its count is zero.
    module: u64,
    link: Field,
    ip: Field,
}

/// Bits in the flags of `ftrace_ops` and of records.
#[derive(Clone, Copy, Debug)]
struct Bits {
    /// `FTRACE_OPS_FL_ENABLED`.
    enabled: u64,
    /// What an `ftrace_ops` requests, and the bit that its records then have.
    requests: [(u64, u64); 3],
    /// `FTRACE_FL_TRAMP`: the only `ftrace_ops` of the record has a trampoline.
    tramp: u64,
}

/// Why the list could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FtraceOpsError {
    /// Memory could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The kernel lacks a symbol.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The kernel's types lack something.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// A list or a hash has a cycle, or is larger than any kernel's.
    #[error("the kernel's list of ftrace_ops or a filter of theirs is corrupt at {0}")]
    Endless(Gva),
}

impl FtraceOps {
    /// Resolves it from a kernel's symbols and types.
    ///
    /// # Errors
    /// [`FtraceOpsError`] that names what the kernel lacks.
    pub fn new(kernel: &Kernel) -> Result<FtraceOps, FtraceOpsError> {
        let btf = &kernel.btf;
        Ok(FtraceOps {
            head: kernel.symbols.address("ftrace_ops_list")?,
            end: kernel.symbols.address("ftrace_list_end")?,
            next: btf.field("ftrace_ops.next")?,
            flags: btf.field("ftrace_ops.flags")?,
            func_hash: btf.field("ftrace_ops.func_hash")?,
            trampoline: btf.field("ftrace_ops.trampoline")?,
            filter: btf.field("ftrace_ops_hash.filter_hash")?,
            notrace: btf.field("ftrace_ops_hash.notrace_hash")?,
            hash: HashLayout::new(btf)?,
            bits: Bits::new(btf)?,
        })
    }

    /// The users' part of the flags that the record of the entry at `ip` must have: how many
    /// `ftrace_ops` cover it, and what they request.
    ///
    /// # Errors
    /// [`FtraceOpsError`].
    pub fn record_flags(&self, memory: &KernelMemory<'_>, ip: Gva) -> Result<u64, FtraceOpsError> {
        let mut walk = Walk {
            memory,
            left: MAX_STEPS,
        };
        let (mut count, mut record) = (0, 0);
        let mut ops = memory.pointer(self.head)?;
        while ops != self.end && !ops.is_null() {
            walk.step(ops)?;
            let flags = memory.field(ops, self.flags)?;
            if flags & self.bits.enabled != 0 && self.covers(&mut walk, ops, ip)? {
                count += 1;
                let requested = self
                    .bits
                    .requests
                    .iter()
                    .filter(|(ops, _)| flags & ops != 0);
                record |= requested.map(|(_, record)| record).sum::<u64>();
                let with_trampoline = count == 1 && memory.field(ops, self.trampoline)? != 0;
                record =
                    record & !self.bits.tramp | if with_trampoline { self.bits.tramp } else { 0 };
            }
            ops = Gva(memory.field(ops, self.next)?);
        }
        Ok(record | count)
    }

    /// Whether the filter of an `ftrace_ops` covers `ip`.
    fn covers(&self, walk: &mut Walk<'_, '_>, ops: Gva, ip: Gva) -> Result<bool, FtraceOpsError> {
        let hashes = Gva(walk.memory.field(ops, self.func_hash)?);
        let hash = |field| Ok::<_, ReadError>(Gva(walk.memory.field(hashes, field)?));
        let (filter, notrace) = (hash(self.filter)?, hash(self.notrace)?);
        let all = self.hash.is_empty(walk.memory, filter)?;
        Ok((all || self.hash.contains(walk, filter, ip)?)
            && !self.hash.contains(walk, notrace, ip)?)
    }
}

impl Bits {
    fn new(btf: &Btf) -> Result<Bits, BtfError> {
        let bit = |name| btf.enum_value(name).map(i64::cast_unsigned);
        Ok(Bits {
            enabled: bit("FTRACE_OPS_FL_ENABLED")?,
            requests: [
                (bit("FTRACE_OPS_FL_SAVE_REGS")?, bit("FTRACE_FL_REGS")?),
                (bit("FTRACE_OPS_FL_IPMODIFY")?, bit("FTRACE_FL_IPMODIFY")?),
                (bit("FTRACE_OPS_FL_DIRECT")?, bit("FTRACE_FL_DIRECT")?),
            ],
            tramp: bit("FTRACE_FL_TRAMP")?,
        })
    }
}

impl HashLayout {
    fn new(btf: &Btf) -> Result<HashLayout, BtfError> {
        Ok(HashLayout {
            size_bits: btf.field("ftrace_hash.size_bits")?,
            buckets: btf.field("ftrace_hash.buckets")?,
            count: btf.field("ftrace_hash.count")?,
            flags: btf.field("ftrace_hash.flags")?,
            module: btf.enum_value("FTRACE_HASH_FL_MOD")?.cast_unsigned(),
            link: btf.field("ftrace_func_entry.hlist")?,
            ip: btf.field("ftrace_func_entry.ip")?,
        })
    }

    /// `ftrace_hash_empty`.
    fn is_empty(&self, memory: &KernelMemory<'_>, hash: Gva) -> Result<bool, ReadError> {
        Ok(hash.is_null()
            || memory.field(hash, self.count)? == 0
                && memory.field(hash, self.flags)? & self.module == 0)
    }

    /// `ftrace_lookup_ip`.
    fn contains(
        &self,
        walk: &mut Walk<'_, '_>,
        hash: Gva,
        ip: Gva,
    ) -> Result<bool, FtraceOpsError> {
        let memory = walk.memory;
        if hash.is_null() || memory.field(hash, self.count)? == 0 {
            return Ok(false);
        }
        let bucket = match memory.field(hash, self.size_bits)? {
            0 => 0,
            bits @ 1..=MAX_HASH_BITS => ip.0.wrapping_mul(GOLDEN_RATIO) >> (64 - bits),
            _ => return Err(FtraceOpsError::Endless(hash)),
        };
        let buckets = Gva(memory.field(hash, self.buckets)?);
        // The first member of a head and of a node is the pointer to the next node.
        let mut node = memory.pointer(buckets.add(bucket * 8))?;
        while !node.is_null() {
            walk.step(node)?;
            if memory.field(self.link.container(node), self.ip)? == ip.0 {
                return Ok(true);
            }
            node = memory.pointer(node)?;
        }
        Ok(false)
    }
}

/// The steps that are left in one reading of the list.
struct Walk<'k, 'm> {
    memory: &'k KernelMemory<'m>,
    left: u32,
}

impl Walk<'_, '_> {
    fn step(&mut self, at: Gva) -> Result<(), FtraceOpsError> {
        self.left = (self.left.checked_sub(1)).ok_or(FtraceOpsError::Endless(at))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::Mock;

    const DATA: Gva = Gva(0xffff_8880_0000_0000);
    const END: Gva = DATA.add(0xf00);
    const IP: Gva = Gva(0xffff_ffff_8100_0104);
    const OTHER: Gva = Gva(0xffff_ffff_8100_0204);
    const SAVE_REGS: u64 = 1 << 2;
    const REGS: u64 = 1 << 29;
    const DIRECT: u64 = 1 << 27;
    const TRAMP: u64 = 1 << 28;

    fn ftrace_ops() -> FtraceOps {
        let field = |offset| Field { offset, size: 8 };
        FtraceOps {
            head: DATA,
            end: END,
            next: field(0),
            flags: field(8),
            func_hash: field(16),
            trampoline: field(24),
            filter: field(8),
            notrace: field(0),
            hash: HashLayout {
                size_bits: field(0),
                buckets: field(8),
                count: field(16),
                flags: field(24),
                module: 1,
                link: field(0),
                ip: field(16),
            },
            bits: Bits {
                enabled: 1,
                requests: [(SAVE_REGS, REGS), (1 << 3, 1 << 30), (1 << 17, DIRECT)],
                tramp: TRAMP,
            },
        }
    }

    /// Memory that is filled from its beginning, word by word; the first word is the list's head.
    struct Memory {
        machine: Mock,
        used: u64,
    }

    impl Memory {
        fn new() -> Memory {
            let mut machine = Mock::new(0x40000);
            machine.map(DATA, Mock::FREE, 0x3);
            let mut memory = Memory { machine, used: 0 };
            memory.put(&[END.0]);
            memory
        }

        fn put(&mut self, words: &[u64]) -> Gva {
            let at = self.used;
            for (word, to) in words.iter().zip((at..).step_by(8)) {
                self.machine.put(Mock::FREE + to, &word.to_le_bytes());
            }
            self.used += 8 * words.len() as u64;
            DATA.add(at)
        }

        /// Adds a hash of `1 << bits` buckets with these addresses.
        fn hash(&mut self, bits: u32, ips: &[Gva]) -> Gva {
            let mut heads = vec![0; 1 << bits];
            for ip in ips {
                let key = ip.0.wrapping_mul(GOLDEN_RATIO).checked_shr(64 - bits);
                let head = &mut heads[usize::try_from(key.unwrap_or(0)).unwrap()];
                *head = self.put(&[*head, 0, ip.0]).0;
            }
            let buckets = self.put(&heads).0;
            self.put(&[bits.into(), buckets, ips.len() as u64, 0])
        }

        /// Adds an `ftrace_ops` to the list.
        fn ops(&mut self, flags: u64, trampoline: u64, filter: Gva, notrace: Gva) {
            let hashes = self.put(&[notrace.0, filter.0]);
            let first = self.machine.word(Mock::FREE);
            let ops = self.put(&[first, flags, hashes.0, trampoline]);
            self.machine.put(Mock::FREE, &ops.0.to_le_bytes());
        }

        fn record_flags(&self) -> Result<u64, FtraceOpsError> {
            ftrace_ops().record_flags(&self.machine.kernel_memory(), IP)
        }
    }

    #[test]
    fn counts_the_ops_whose_filter_covers_the_entry() {
        for bits in [0, 1, 4] {
            let mut memory = Memory::new();
            assert_eq!(memory.record_flags(), Ok(0));
            let (none, its) = (memory.hash(bits, &[]), memory.hash(bits, &[OTHER, IP]));
            let others = memory.hash(bits, &[OTHER]);
            memory.ops(1, 0, others, none);
            memory.ops(0, 0, its, none);
            memory.ops(1, 0, none, its);
            memory.ops(1, 0, its, its);
            assert_eq!(memory.record_flags(), Ok(0), "{bits} bits");
            memory.ops(1, 0, its, others);
            memory.ops(1, 0, none, Gva(0));
            memory.ops(1, 0, Gva(0), others);
            assert_eq!(memory.record_flags(), Ok(3), "{bits} bits");
        }
    }

    #[test]
    fn a_filter_for_modules_not_loaded_yet_is_not_empty() {
        let mut memory = Memory::new();
        let waiting = memory.put(&[0, 0, 0, 1]);
        memory.ops(1, 0, waiting, Gva(0));
        assert_eq!(memory.record_flags(), Ok(0));
    }

    #[test]
    fn the_record_has_the_bits_that_the_ops_request() {
        let mut memory = Memory::new();
        let its = memory.hash(2, &[IP]);
        memory.ops(1 | SAVE_REGS, 5, its, Gva(0));
        assert_eq!(memory.record_flags(), Ok(1 | REGS | TRAMP));
        memory.ops(1 | 1 << 17, 5, its, Gva(0));
        assert_eq!(memory.record_flags(), Ok(2 | REGS | DIRECT));
    }

    #[test]
    fn endless_lists_are_errors() {
        let mut memory = Memory::new();
        memory.ops(0, 0, Gva(0), Gva(0));
        let ops = DATA.add(memory.used - 32);
        memory
            .machine
            .put(Mock::FREE + memory.used - 32, &ops.0.to_le_bytes());
        assert_eq!(memory.record_flags(), Err(FtraceOpsError::Endless(ops)));

        let mut memory = Memory::new();
        let ring = memory.put(&[DATA.0 + 8, 0, 0]);
        let buckets = memory.put(&[ring.0]);
        let hash = memory.put(&[0, buckets.0, 1, 0]);
        memory.ops(1, 0, hash, Gva(0));
        assert_eq!(memory.record_flags(), Err(FtraceOpsError::Endless(ring)));

        let mut memory = Memory::new();
        let wide = memory.put(&[64, 0, 1, 0]);
        memory.ops(1, 0, wide, Gva(0));
        assert_eq!(memory.record_flags(), Err(FtraceOpsError::Endless(wide)));
    }
}
