//! What the guest's CPUID instruction returns: what KVM supports, plus the topology and each vCPU's
//! place in it.
//!
//! The leaves that all vCPUs share are made once ([`shared`]); [`for_vcpu`] then fills in those
//! that identify a vCPU. The topology is one socket of cores with one thread each; the APIC id is
//! the vCPU's index.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const EXTENDED_TOPOLOGY: u32 = 0xb;
const V2_EXTENDED_TOPOLOGY: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: `index` of the entry is a subleaf.
const SIGNIFICANT_INDEX: u32 = 1;

/// Why the CPUID leaves could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not report what it supports.
    #[error("KVM_GET_SUPPORTED_CPUID failed")]
    Supported(#[source] kvm_ioctls::Error),
    /// There are more leaves than KVM accepts.
    #[error("too many CPUID leaves")]
    TooMany,
}

/// The leaves of `cpus` vCPUs, without what identifies one of them.
///
/// # Errors
/// [`CpuidError::Supported`].
pub fn shared(kvm: &Kvm, cpus: u8) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(CpuidError::Supported)?;
    let deadline_timer = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    Ok(arrange(supported.as_slice(), cpus, deadline_timer))
}

/// The number of guest-physical address bits that `leaves` report.
#[must_use]
pub fn physical_bits(leaves: &[kvm_cpuid_entry2]) -> u8 {
    let eax = leaves
        .iter()
        .find(|leaf| leaf.function == ADDRESS_SIZES)
        .map_or(0, |leaf| leaf.eax);
    match eax.to_le_bytes() {
        // Only processors too old to run here lack ADDRESS_SIZES; they have 36 bits.
        [0, ..] => 36,
        [bits, ..] => bits.min(52),
    }
}

fn arrange(
    supported: &[kvm_cpuid_entry2],
    cpus: u8,
    deadline_timer: bool,
) -> Vec<kvm_cpuid_entry2> {
    let several = cpus > 1;
    let cores = u32::from(cpus.max(1));
    let id_bits = id_bits(cpus);
    let highest = supported
        .iter()
        .map(|leaf| leaf.function)
        .filter(|function| *function < 0x4000_0000)
        .max();
    let mut leaves: Vec<_> = supported
        .iter()
        // The host's topology does not apply to the guest; the guest's own is added below.
        .filter(|leaf| {
            ![
                EXTENDED_TOPOLOGY,
                V2_EXTENDED_TOPOLOGY,
                AMD_EXTENDED_TOPOLOGY,
            ]
            .contains(&leaf.function)
        })
        .copied()
        .collect();
    for leaf in &mut leaves {
        match leaf.function {
            FEATURES => {
                leaf.ecx |= FEATURES_ECX_HYPERVISOR | FEATURES_ECX_X2APIC;
                if deadline_timer {
                    leaf.ecx |= FEATURES_ECX_TSC_DEADLINE;
                }
                set(&mut leaf.edx, FEATURES_EDX_HTT, several);
                // EBX[23:16]: the number of APIC ids in the package.
                leaf.ebx = leaf.ebx & 0x0000_ffff | (1 << id_bits) << 16;
            }
            // EAX[31:26]: cores of the package, less one. EAX[25:14]: threads that share the cache,
            // less one. EAX[4:0] is 0 where there is no cache.
            CACHES if leaf.eax & 0x1f != 0 => {
                let last_level = (leaf.eax >> 5) & 7 >= 3;
                let sharers = if last_level { cores - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharers << 14 | (cores - 1) << 26;
            }
            EXTENDED_FEATURES => set(&mut leaf.ecx, EXTENDED_ECX_CMP_LEGACY, several),
            // ECX[7:0]: cores less one. ECX[15:12]: bits of a core's id.
            ADDRESS_SIZES => leaf.ecx = leaf.ecx & !0xf0ff | (cores - 1) | id_bits << 12,
            AMD_CACHES if leaf.eax & 0x1f != 0 => {
                let last_level = (leaf.eax >> 5) & 7 >= 3;
                let sharers = if last_level { cores - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharers << 14;
            }
            _ => {}
        }
    }
    if highest >= Some(EXTENDED_TOPOLOGY) {
        leaves.extend(topology(cores, id_bits));
    }
    leaves
}

/// Leaf 0xb: the thread level (one thread a core), the core level (all cores of the package), and
/// the level that ends the list.
fn topology(cores: u32, id_bits: u32) -> [kvm_cpuid_entry2; 3] {
    [(0, 1, 1), (id_bits, cores, 2), (0, 0, 0)].map(|(shift, count, kind)| {
        let index = if kind == 0 { 2 } else { kind - 1 };
        kvm_cpuid_entry2 {
            function: EXTENDED_TOPOLOGY,
            index,
            flags: SIGNIFICANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            ..Default::default()
        }
    })
}

/// The leaves of vCPU `index`, made from the [`shared`] ones.
///
/// # Errors
/// [`CpuidError::TooMany`].
pub fn for_vcpu(shared: &[kvm_cpuid_entry2], index: u8) -> Result<CpuId, CpuidError> {
    let id = u32::from(index);
    let mut leaves = shared.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            FEATURES => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            EXTENDED_TOPOLOGY => leaf.edx = id,
            AMD_TOPOLOGY => {
                leaf.eax = id;
                // EBX[15:8]: threads of a core, less one. EBX[7:0]: the core's id. ECX: node 0 of
                // one.
                leaf.ebx = id;
                leaf.ecx = 0;
            }
            _ => {}
        }
    }
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany)
}

/// How many bits of the APIC id distinguish `cpus` cores.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus.max(1)).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ..Default::default()
        }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_gets_its_id_and_all_the_same_topology() {
        let mut host = [
            leaf(FEATURES),
            leaf(0xd),
            leaf(EXTENDED_TOPOLOGY),
            leaf(ADDRESS_SIZES),
            leaf(AMD_TOPOLOGY),
        ];
        host[0].ebx = 0x07ff_0800;
        host[1].ebx = 0x1234;
        host[2].edx = 77;
        host[3].eax = 0x3028;
        let shared = arrange(&host, 6, true);
        assert_eq!(physical_bits(&shared), 40);
        assert_eq!(
            find(&shared, 0xd, 0).ebx,
            0x1234,
            "XSAVE sizes are as KVM gives them"
        );
        let third = for_vcpu(&shared, 2).unwrap();
        let features = find(third.as_slice(), FEATURES, 0);
        assert_eq!(features.ebx, 0x0208_0800);
        assert_ne!(features.ecx & FEATURES_ECX_HYPERVISOR, 0);
        assert_ne!(features.ecx & FEATURES_ECX_TSC_DEADLINE, 0);
        assert_ne!(features.edx & FEATURES_EDX_HTT, 0);
        let core = find(third.as_slice(), EXTENDED_TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 2));
        let thread = find(third.as_slice(), EXTENDED_TOPOLOGY, 0);
        assert_eq!(
            (thread.eax, thread.ebx, thread.ecx, thread.edx),
            (0, 1, 0x100, 2)
        );
        assert_eq!(find(third.as_slice(), ADDRESS_SIZES, 0).ecx, 5 | 3 << 12);
        assert_eq!(find(third.as_slice(), AMD_TOPOLOGY, 0).ebx, 2);
    }

    #[test]
    fn one_vcpu_has_no_siblings() {
        let shared = arrange(&[leaf(FEATURES), leaf(0xd)], 1, false);
        let features = find(&shared, FEATURES, 0);
        assert_eq!(features.edx & FEATURES_EDX_HTT, 0);
        assert_eq!(features.ebx >> 16 & 0xff, 1);
    }
}
