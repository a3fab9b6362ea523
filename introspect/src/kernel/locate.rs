//! Locates the kernel image from a vCPU's registers: its virtual and physical base, under KASLR and
//! page table isolation.
//!
//! A vCPU holds addresses inside the image whatever it does: its system call entry (LSTAR), its
//! interrupt gates, its FRED entry, and, in the kernel, its instruction pointer. From any of them
//! the image's start is as far down as memory is mapped without a gap, because nothing else is
//! mapped below it (`arch/x86/mm/init_64.c: cleanup_highmap`). This module must not know anything
//! else about what is in the image.

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::kernel::halted::is_halted_permanently;
use crate::memory::PhysMemory;
use crate::memory::kernel::KernelMemory;
use crate::memory::paging::AddressSpace;
use crate::vcpu::VcpuRegs;

/// From `__START_KERNEL_map` on, `KERNEL_IMAGE_SIZE` bytes: no image lies elsewhere
/// (`asm/page_64_types.h`).
pub(crate) const IMAGE_RANGE: GvaRange =
    GvaRange::new(Gva(0xffff_ffff_8000_0000), Gva(0xffff_ffff_c000_0000));
/// Images begin at a multiple of this (`CONFIG_PHYSICAL_ALIGN`), and are mapped with pages of this
/// size.
const STEP: u64 = 2 << 20;
/// The most bytes that an image may have: the largest of a stock kernel has about 64 MiB.
const MAX_IMAGE: u64 = 256 << 20;
/// The most places that are tried. Each may cost a search of a whole image, and each vCPU of a
/// hostile guest can show another.
const MAX_CANDIDATES: usize = 4;
/// The most entries of an interrupt descriptor table, and the bytes of one.
const GATES: usize = 256;
const GATE: usize = 16;

/// A place where a kernel image seems to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The page tables that map it.
    pub(crate) space: AddressSpace,
    /// The virtual address at which it begins (`_text`).
    pub(crate) base: Gva,
    /// The physical address of the same.
    pub(crate) phys: GuestAddress,
    /// The end of the last page of it that is mapped.
    pub(crate) end: Gva,
}

impl Candidate {
    /// Whether the two are the same image: each vCPU has page tables of its own, and all map the
    /// kernel alike.
    fn is_same(&self, other: &Candidate) -> bool {
        let place = |c: &Candidate| (c.base, c.phys, c.end, c.space.levels);
        place(self) == place(other)
    }
}

/// Every place that the vCPUs' registers lead to, the most likely first, each once; empty early in
/// boot. vCPUs that are halted permanently may be in a kernel that another one has replaced: they
/// count only if there are no others.
pub(crate) fn candidates(phys: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    let online = vcpus.iter().filter(|regs| regs.online && !regs.foreign);
    let (halted, awake): (Vec<_>, Vec<_>) =
        online.partition(|regs| is_halted_permanently(phys, regs));
    for regs in if awake.is_empty() { halted } else { awake } {
        let Some(space) = AddressSpace::of_vcpu(regs) else {
            continue;
        };
        // Under page table isolation a vCPU in user mode is on the user's page tables, which map
        // the entry text and no more. Without isolation, the page that would be the kernel's tables
        // is some other page, and leads to no image.
        for space in [space.kernel_half(), space] {
            let memory = KernelMemory::new(phys, space);
            for hint in hints(&memory, regs) {
                if let Some(candidate) = image(&memory, hint) {
                    if !found.iter().any(|known| known.is_same(&candidate)) {
                        found.push(candidate);
                    }
                    break;
                }
            }
            if found.len() >= MAX_CANDIDATES {
                return found;
            }
        }
    }
    found
}

/// Addresses inside the image: where the vCPU would continue at its next kernel entry.
fn hints(memory: &KernelMemory<'_>, regs: &VcpuRegs) -> Vec<Gva> {
    let mut hints = vec![Gva(regs.lstar)];
    hints.extend(regs.fred_config.map(|config| Gva(config & !0xfff)));
    if regs.cpl == 0 {
        hints.push(Gva(regs.rip));
    }
    hints.extend(gates(memory, regs));
    hints.retain(|hint| IMAGE_RANGE.contains(*hint));
    hints.dedup_by_key(|hint| hint.0 / STEP);
    hints
}

/// The entry points in the interrupt gates (Intel SDM volume 3, figure 7-8).
fn gates(memory: &KernelMemory<'_>, regs: &VcpuRegs) -> Vec<Gva> {
    let count = ((usize::from(regs.idt_limit) + 1) / GATE).min(GATES);
    let mut raw = vec![0; count * GATE];
    if memory.read(Gva(regs.idt_base), &mut raw).is_err() {
        return Vec::new();
    }
    raw.chunks_exact(GATE)
        .filter_map(|gate| {
            let low = u64::from_le_bytes(gate.get(..8)?.try_into().ok()?);
            let high = u32::from_le_bytes(gate.get(8..12)?.try_into().ok()?);
            Some(Gva(low & 0xffff
                | low >> 32 & 0xffff_0000
                | u64::from(high) << 32))
        })
        .collect()
}

/// The image around `hint`: contiguous in virtual and in physical memory.
fn image(memory: &KernelMemory<'_>, hint: Gva) -> Option<Candidate> {
    let frame = |gva| {
        let mapping = memory.translate(gva).ok()?;
        IMAGE_RANGE.contains(gva).then_some(mapping.gpa)
    };
    let mut base = Gva(hint.0 & !(STEP - 1));
    let mut phys = frame(base)?;
    for _ in 0..MAX_IMAGE / STEP {
        let below = base.sub(STEP);
        match frame(below) {
            Some(gpa) if gpa.0.checked_add(STEP) == Some(phys.0) => (base, phys) = (below, gpa),
            _ => break,
        }
    }
    let mut end = base;
    for step in 0..MAX_IMAGE / STEP {
        // Parts of the image are freed and unmapped once the guest has booted: the last page that
        // is mapped counts.
        let gva = base.add(step * STEP);
        if frame(gva).is_some_and(|gpa| gpa.0.wrapping_sub(phys.0) == step * STEP) {
            end = gva.add(STEP);
        }
    }
    Some(Candidate {
        space: memory.space(),
        base,
        phys,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    /// A vCPU whose page tables at `root` map `entry` at the start of the image range.
    fn vcpu(ram: &mut Ram, root: u64, entry: u64) -> VcpuRegs {
        let at = |offset: u64| usize::try_from(root + offset).unwrap();
        ram.u64(at(8 * 511), (root + 0x1000) | 3);
        ram.u64(at(0x1000 + 8 * 510), (root + 0x2000) | 3);
        ram.u64(at(0x2000), entry | 0x83);
        VcpuRegs {
            cr0: 1 << 31,
            efer: 1 << 10,
            cr3: root,
            lstar: IMAGE_RANGE.start.0 + 0x1000,
            online: true,
            ..VcpuRegs::default()
        }
    }

    #[test]
    fn tables_that_map_one_image_are_one_candidate() {
        let mut ram = Ram::new(0x10_0000);
        let vcpus: Vec<_> = (0..16)
            .map(|n| vcpu(&mut ram, 0x4000 * (n + 1), 0x20_0000))
            .collect();
        assert_eq!(candidates(&ram, &vcpus).len(), 1);
    }

    #[test]
    fn many_vcpus_do_not_make_many_candidates() {
        let mut ram = Ram::new(0x10_0000);
        let vcpus: Vec<_> = (0..32)
            .map(|n| vcpu(&mut ram, 0x4000 * (n + 1), 0x20_0000 * (n + 1)))
            .collect();
        assert_eq!(candidates(&ram, &vcpus).len(), MAX_CANDIDATES);
    }

    /// The case of a dump that lacks the MSR of the system call entry, with the vCPU in user mode.
    #[test]
    fn interrupt_gates_alone_lead_to_the_image() {
        let mut ram = Ram::new(0x10_0000);
        ram.u64(0x1000 + 8 * 511, 0x2003);
        ram.u64(0x2000 + 8 * 510, 0x3003);
        // Four large pages from 0x8100_0000 on, in physical memory from 16 MiB on.
        for page in 0..4 {
            ram.u64(
                0x3000 + 8 * (8 + page),
                (0x100_0000 + page as u64 * STEP) | 0x83,
            );
        }
        // The interrupt table at the start of the last 512 GiB but one.
        ram.u64(0x1000 + 8 * 508, 0x4003);
        ram.u64(0x4000, 0x5003);
        ram.u64(0x5000, 0x6003);
        ram.u64(0x6000, 0x7003);
        let entry = 0xffff_ffff_8140_1230_u64;
        ram.u64(
            0x7000,
            entry & 0xffff | (entry & 0xffff_0000) << 32 | 0x8e00 << 32,
        );
        ram.u64(0x7008, entry >> 32);
        let regs = VcpuRegs {
            cpl: 3,
            cr0: 1 << 31,
            cr3: 0x1000,
            efer: 1 << 10,
            idt_base: 0xffff_fe00_0000_0000,
            idt_limit: 15,
            online: true,
            ..VcpuRegs::default()
        };
        let found = candidates(&ram, std::slice::from_ref(&regs));
        let [candidate] = found.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(candidate.base, Gva(0xffff_ffff_8100_0000));
        assert_eq!(candidate.phys, GuestAddress(0x100_0000));
        assert_eq!(candidate.end, Gva(0xffff_ffff_8180_0000));
        let offline = VcpuRegs {
            online: false,
            ..regs
        };
        assert!(candidates(&ram, &[offline]).is_empty());
    }
}
