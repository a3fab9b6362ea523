//! From a vCPU's registers to where the kernel image lies: virtual and physical base, under KASLR and page table isolation.
//!
//! A vCPU names addresses inside the image whatever it is doing: its system call entry (LSTAR), its interrupt gates, its FRED
//! entry, and, in the kernel, its instruction pointer. From any of them the image's start is as far down as memory is mapped
//! without a break, because nothing else is mapped below it (`arch/x86/mm/init_64.c: cleanup_highmap`). Knows nothing of what is
//! in the image but that.

use vm_memory::GuestAddress;

use crate::addr::{Gva, GvaRange};
use crate::memory::PhysMemory;
use crate::memory::kernel::KernelMemory;
use crate::memory::paging::AddressSpace;
use crate::vcpu::VcpuRegs;

/// `__START_KERNEL_map`, and `KERNEL_IMAGE_SIZE` behind it: no image lies elsewhere (`asm/page_64_types.h`).
pub const IMAGE_WINDOW: GvaRange =
    GvaRange::new(Gva(0xffff_ffff_8000_0000), Gva(0xffff_ffff_c000_0000));
/// Images begin at a multiple of this (`CONFIG_PHYSICAL_ALIGN`), and are mapped with pages of it.
const STEP: u64 = 2 << 20;
/// No image is longer: the largest of a stock kernel has about 64 MiB.
const MAX_IMAGE: u64 = 256 << 20;
/// Each place may cost a look at a whole image, and each vCPU of a hostile guest can show another.
const MAX_CANDIDATES: usize = 4;
const GATES: usize = 256;
const GATE: usize = 16;

/// A place where a kernel image seems to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The tables that map it.
    pub space: AddressSpace,
    /// Where it begins (`_text`).
    pub base: Gva,
    /// The same in physical memory.
    pub phys: GuestAddress,
    /// Behind the last page of it that is mapped.
    pub end: Gva,
}

impl Candidate {
    /// Whether the two lead to the same image: vCPUs have each their own tables, and all map the kernel alike.
    fn is_same(&self, other: &Candidate) -> bool {
        let place = |c: &Candidate| (c.base, c.phys, c.end, c.space.levels);
        place(self) == place(other)
    }
}

/// Every place that the vCPUs' registers lead to, most likely first, each once; none early in boot.
#[must_use]
pub fn candidates(phys: &dyn PhysMemory, vcpus: &[VcpuRegs]) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for regs in vcpus.iter().filter(|regs| regs.online && !regs.foreign) {
        let Some(space) = AddressSpace::of_vcpu(regs) else {
            continue;
        };
        // In user mode under page table isolation the vCPU is on the user's half, which maps the entry text and no more. The
        // kernel's half of a kernel without isolation is some other page: what it leads to is then no image.
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

/// Addresses inside the image, by what the vCPU would do at its next entry to the kernel.
fn hints(memory: &KernelMemory<'_>, regs: &VcpuRegs) -> Vec<Gva> {
    let mut hints = vec![Gva(regs.lstar)];
    hints.extend(regs.fred_config.map(|config| Gva(config & !0xfff)));
    if regs.cpl == 0 {
        hints.push(Gva(regs.rip));
    }
    hints.extend(gates(memory, regs));
    hints.retain(|hint| IMAGE_WINDOW.contains(*hint));
    hints.dedup_by_key(|hint| hint.0 / STEP);
    hints
}

/// Where the interrupt gates lead (Intel SDM volume 3, figure 7-8).
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

/// The image around `hint`: contiguous in physical memory too.
fn image(memory: &KernelMemory<'_>, hint: Gva) -> Option<Candidate> {
    let frame = |gva| {
        let mapping = memory.translate(gva).ok()?;
        IMAGE_WINDOW.contains(gva).then_some(mapping.gpa)
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
        // Parts of the image are given back and unmapped once the guest has booted: the last mapped page counts.
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

    /// A vCPU whose tables at `root` map `entry` at the start of the image window.
    fn vcpu(ram: &mut Ram, root: u64, entry: u64) -> VcpuRegs {
        let at = |offset: u64| usize::try_from(root + offset).unwrap();
        ram.u64(at(8 * 511), (root + 0x1000) | 3);
        ram.u64(at(0x1000 + 8 * 510), (root + 0x2000) | 3);
        ram.u64(at(0x2000), entry | 0x83);
        VcpuRegs {
            cr0: 1 << 31,
            efer: 1 << 10,
            cr3: root,
            lstar: IMAGE_WINDOW.start.0 + 0x1000,
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

    /// What a dump that lacks the system call entry's MSR leaves to go by, with the vCPU in user mode.
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
