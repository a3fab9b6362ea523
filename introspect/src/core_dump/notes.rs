//! The notes of a core file: what each says of a vCPU, parsed and written in one place so that both
//! agree.
//!
//! This module knows the layout of each kind of note; it must not know the file around them, or
//! kernels. Three kinds matter: `CORE`, which every debugger reads; `QEMU`, in which QEMU's dumps
//! have the control registers (`target/i386/arch_dump.c: QEMUCPUState`), known to crash and drgn;
//! and `outpatch`, the only one with all of [`VcpuRegs`]. Notes are hostile input: they are read
//! through `NoteReader`, which cannot read past their end.

use object::elf;

use crate::vcpu::VcpuRegs;
use crate::x86::{CR0_PG, CR4_PAE, EFER_LMA, EFER_LME};

/// The name of the notes that any debugger understands.
pub(crate) const CORE: &str = "CORE";
/// The name of QEMU's notes.
pub(crate) const QEMU: &str = "QEMU";
/// The name of outpatch's notes.
pub(crate) const OUTPATCH: &str = "outpatch";
/// The name of the note with what the kernel provides for its own crash dumps.
pub(crate) const VMCOREINFO: &str = "VMCOREINFO";

/// The only version of both layouts so far. New fields are appended and show in the size.
const VERSION: u32 = 1;
/// EFER of a vCPU in long mode.
const EFER_LONG_MODE: u64 = EFER_LME | EFER_LMA;

/// Flags in an outpatch note.
const ONLINE: u32 = 1 << 0;
const FOREIGN: u32 = 1 << 1;
const FRED: u32 = 1 << 2;
const HALTED: u32 = 1 << 3;

/// Why a note cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoteError {
    /// The note is shorter than its layout or its size field requires.
    #[error("it has {found} bytes, fewer than its layout needs")]
    Short {
        /// The length of the note in bytes.
        found: usize,
    },
    /// The note has an unknown version of its layout.
    #[error("its layout has version {found}, and only version {VERSION} is supported")]
    Version {
        /// The version in the note.
        found: u32,
    },
}

/// Reads little-endian numbers one after the other.
struct NoteReader<'a>(&'a [u8]);

impl NoteReader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*word)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn fill<const N: usize>(&mut self, fields: [&mut u64; N]) -> Option<()> {
        for field in fields {
            *field = self.u64()?;
        }
        Some(())
    }
}

/// The general registers, in QEMU's order.
fn general_registers(regs: &mut VcpuRegs) -> [&mut u64; 18] {
    [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rsp,
        &mut regs.rbp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
        &mut regs.rip,
        &mut regs.rflags,
    ]
}

/// The system registers, in the order of an outpatch note.
fn system_registers(regs: &mut VcpuRegs) -> [&mut u64; 9] {
    [
        &mut regs.cr0,
        &mut regs.cr3,
        &mut regs.cr4,
        &mut regs.efer,
        &mut regs.fs_base,
        &mut regs.gs_base,
        &mut regs.kernel_gs_base,
        &mut regs.lstar,
        &mut regs.idt_base,
    ]
}

/// Parses one of outpatch's notes.
///
/// # Errors
/// [`NoteError`].
pub(crate) fn parse_outpatch(desc: &[u8]) -> Result<VcpuRegs, NoteError> {
    let mut reader = check_header(desc)?;
    let mut parse = || {
        let mut regs = VcpuRegs {
            index: reader.u32()?,
            ..VcpuRegs::default()
        };
        let flags = reader.u32()?;
        let [cpl, _, limit @ ..] = reader.take::<4>()?;
        regs.cpl = cpl & 3;
        regs.idt_limit = u16::from_le_bytes(limit);
        let _ = reader.u32()?;
        reader.fill(general_registers(&mut regs))?;
        reader.fill(system_registers(&mut regs))?;
        let fred_config = reader.u64()?;
        regs.fred_config = (flags & FRED != 0).then_some(fred_config);
        regs.online = flags & ONLINE != 0;
        regs.foreign = flags & FOREIGN != 0;
        regs.halted = flags & HALTED != 0;
        Some(regs)
    };
    parse().ok_or(NoteError::Short { found: desc.len() })
}

/// Parses one of QEMU's notes, the `index`th of the file.
///
/// Registers that it does not have are derived from others: a 64-bit dump is of a guest in long
/// mode, and a vCPU without paging was not started. Whether a vCPU runs a nested guest cannot be
/// determined.
///
/// # Errors
/// [`NoteError`].
pub(crate) fn parse_qemu(index: u32, desc: &[u8]) -> Result<VcpuRegs, NoteError> {
    let mut reader = check_header(desc)?;
    let mut parse = || {
        let mut regs = VcpuRegs {
            index,
            ..VcpuRegs::default()
        };
        reader.fill(general_registers(&mut regs))?;
        // cs ds es fs gs ss ldt tr gdt idt
        let mut segments = [Segment::default(); 10];
        for segment in &mut segments {
            *segment = Segment::parse(&mut reader)?;
        }
        let [cs, _, _, fs, gs, _, _, _, _, idt] = segments;
        regs.cpl = u8::try_from(cs.selector & 3).ok()?;
        regs.fs_base = fs.base;
        regs.gs_base = gs.base;
        regs.idt_base = idt.base;
        regs.idt_limit = u16::try_from(idt.limit).unwrap_or(u16::MAX);
        regs.cr0 = reader.u64()?;
        let (_cr1, _cr2) = (reader.u64()?, reader.u64()?);
        regs.cr3 = reader.u64()?;
        regs.cr4 = reader.u64()?;
        // Dumps of QEMU before 2.12 do not have it.
        regs.kernel_gs_base = reader.u64().unwrap_or_default();
        regs.online = regs.cr0 & CR0_PG != 0;
        if regs.online && regs.cr4 & CR4_PAE != 0 {
            regs.efer = EFER_LONG_MODE;
        }
        Some(regs)
    };
    parse().ok_or(NoteError::Short { found: desc.len() })
}

/// Checks the version and size with which both layouts start, and returns a reader of the rest.
fn check_header(desc: &[u8]) -> Result<NoteReader<'_>, NoteError> {
    let short = NoteError::Short { found: desc.len() };
    let mut head = NoteReader(desc);
    let (version, size) = (head.u32().ok_or(short)?, head.u32().ok_or(short)?);
    if version != VERSION {
        return Err(NoteError::Version { found: version });
    }
    let note = usize::try_from(size).ok().and_then(|size| desc.get(..size));
    let body = note.and_then(|note| note.get(8..)).ok_or(short)?;
    Ok(NoteReader(body))
}

/// A segment register in QEMU's form.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    selector: u32,
    limit: u32,
    /// The second word of its descriptor.
    flags: u32,
    base: u64,
}

impl Segment {
    fn parse(reader: &mut NoteReader<'_>) -> Option<Segment> {
        let (selector, limit, flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let _padding = reader.u32()?;
        Some(Segment {
            selector,
            limit,
            flags,
            base: reader.u64()?,
        })
    }

    fn write(self, out: &mut Vec<u8>) {
        for word in [self.selector, self.limit, self.flags, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.base.to_le_bytes());
    }
}

/// Encodes all notes of a dump of these vCPUs. `vmcoreinfo` is the text that the guest's kernel
/// provides for its own dumps.
#[must_use]
pub fn encode(vcpus: &[VcpuRegs], vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for regs in vcpus {
        push_note(&mut out, CORE, elf::NT_PRSTATUS.0, &prstatus_note(regs));
    }
    for regs in vcpus {
        push_note(&mut out, QEMU, 0, &qemu_note(regs));
    }
    if let Some(text) = vmcoreinfo {
        push_note(&mut out, VMCOREINFO, 0, text);
    }
    for regs in vcpus {
        push_note(&mut out, OUTPATCH, 0, &outpatch_note(regs));
    }
    out
}

fn push_note(out: &mut Vec<u8>, name: &str, kind: u32, desc: &[u8]) {
    let length = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    for word in [length(name.len() + 1), length(desc.len()), kind] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(desc);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The selectors with which Linux runs at this privilege level: code, stack. Those of the vCPU are
/// not kept, and readers need them only to see whether it was in the kernel.
fn selectors(regs: &VcpuRegs) -> (u32, u32) {
    if regs.cpl == 0 {
        (0x10, 0x18)
    } else {
        (0x33, 0x2b)
    }
}

/// `struct elf_prstatus` of x86-64 (`include/linux/elfcore.h`). Everything but the registers is
/// zero, except for the process id, which is the number of the vCPU from 1 on.
fn prstatus_note(regs: &VcpuRegs) -> Vec<u8> {
    const BEFORE_PID: usize = 32;
    const BEFORE_REGISTERS: usize = 112;
    let (cs, ss) = selectors(regs);
    let user_regs = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        0, // orig_rax
        regs.rip,
        cs.into(),
        regs.rflags,
        regs.rsp,
        ss.into(),
        regs.fs_base,
        regs.gs_base,
        0, // ds, es, fs, gs
        0,
        0,
        0,
    ];
    let mut out = vec![0; BEFORE_PID];
    out.extend_from_slice(&regs.index.saturating_add(1).to_le_bytes());
    out.resize(BEFORE_REGISTERS, 0);
    for register in user_regs {
        out.extend_from_slice(&register.to_le_bytes());
    }
    out.extend_from_slice(&[0; 8]); // pr_fpvalid
    out
}

fn qemu_note(regs: &VcpuRegs) -> Vec<u8> {
    let mut regs = regs.clone();
    let (code, stack) = selectors(&regs);
    let dpl = u32::from(regs.cpl & 3) << 13;
    let flat = |selector, flags| Segment {
        selector,
        limit: u32::MAX,
        flags,
        base: 0,
    };
    let at = |limit, base| Segment {
        limit,
        base,
        ..Segment::default()
    };
    let segments = [
        flat(code, 0x00a0_9b00 | dpl), // present, 64-bit code
        Segment::default(),
        Segment::default(),
        at(0, regs.fs_base),
        at(0, regs.gs_base),
        flat(stack, 0x00c0_9300 | dpl), // present, writable data
        Segment::default(),
        Segment::default(),
        Segment::default(),
        at(regs.idt_limit.into(), regs.idt_base),
    ];
    let mut body = Vec::new();
    for register in general_registers(&mut regs) {
        body.extend_from_slice(&register.to_le_bytes());
    }
    for segment in segments {
        segment.write(&mut body);
    }
    // CR1 does not exist and CR2 is not kept.
    for register in [regs.cr0, 0, 0, regs.cr3, regs.cr4, regs.kernel_gs_base] {
        body.extend_from_slice(&register.to_le_bytes());
    }
    with_size(body)
}

fn outpatch_note(regs: &VcpuRegs) -> Vec<u8> {
    let mut regs = regs.clone();
    let flag = |set: bool, flag| if set { flag } else { 0 };
    let flags = flag(regs.online, ONLINE)
        | flag(regs.foreign, FOREIGN)
        | flag(regs.fred_config.is_some(), FRED)
        | flag(regs.halted, HALTED);
    let mut body = Vec::new();
    body.extend_from_slice(&regs.index.to_le_bytes());
    body.extend_from_slice(&flags.to_le_bytes());
    body.extend_from_slice(&[regs.cpl, 0]);
    body.extend_from_slice(&regs.idt_limit.to_le_bytes());
    body.extend_from_slice(&[0; 4]);
    for register in general_registers(&mut regs) {
        body.extend_from_slice(&register.to_le_bytes());
    }
    for register in system_registers(&mut regs) {
        body.extend_from_slice(&register.to_le_bytes());
    }
    body.extend_from_slice(&regs.fred_config.unwrap_or_default().to_le_bytes());
    with_size(body)
}

fn with_size(body: Vec<u8>) -> Vec<u8> {
    let size = u32::try_from(body.len() + 8).unwrap_or(u32::MAX);
    let mut out = [VERSION.to_le_bytes(), size.to_le_bytes()].concat();
    out.extend(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distinct() -> VcpuRegs {
        let mut regs = VcpuRegs {
            index: 3,
            cpl: 3,
            idt_limit: 0xfff,
            fred_config: Some(0x77),
            online: true,
            halted: true,
            ..VcpuRegs::default()
        };
        let mut value = 0x1000;
        for field in general_registers(&mut regs) {
            value += 1;
            *field = value;
        }
        for field in system_registers(&mut regs) {
            value += 1;
            *field = value;
        }
        regs
    }

    #[test]
    fn the_outpatch_note_keeps_everything() {
        let regs = distinct();
        assert_eq!(parse_outpatch(&outpatch_note(&regs)), Ok(regs));
        let off = VcpuRegs {
            foreign: true,
            ..VcpuRegs::default()
        };
        assert_eq!(parse_outpatch(&outpatch_note(&off)), Ok(off));
    }

    #[test]
    fn the_qemu_note_keeps_the_registers_that_find_the_kernel() {
        let mut regs = distinct();
        regs.cr0 = CR0_PG | 1;
        regs.cr4 = CR4_PAE;
        let desc = qemu_note(&regs);
        assert_eq!(desc.len(), 440, "sizeof(QEMUCPUState)");
        let read = parse_qemu(3, &desc).unwrap();
        let expected = VcpuRegs {
            efer: EFER_LONG_MODE,
            lstar: 0,
            fred_config: None,
            halted: false,
            ..regs
        };
        assert_eq!(read, expected);
        // An older QEMU has no KERNEL_GS_BASE; a secondary processor that waits for its start has
        // no paging.
        let mut old = desc.clone();
        old.truncate(432);
        old[4..8].copy_from_slice(&432_u32.to_le_bytes());
        assert_eq!(parse_qemu(3, &old).unwrap().kernel_gs_base, 0);
        regs.cr0 = 0x6000_0010;
        let waiting = parse_qemu(0, &qemu_note(&regs)).unwrap();
        assert!(!waiting.online && waiting.efer == 0);
    }

    #[test]
    fn prstatus_has_the_kernels_layout() {
        let desc = prstatus_note(&distinct());
        assert_eq!(desc.len(), 336, "sizeof(struct elf_prstatus)");
        assert_eq!(desc[32..36], 4_u32.to_le_bytes());
        assert_eq!(desc[112..120], 0x1010_u64.to_le_bytes(), "r15 comes first");
    }

    #[test]
    fn notes_with_a_wrong_size_are_refused() {
        let good = outpatch_note(&distinct());
        for len in 0..good.len() {
            assert!(parse_outpatch(&good[..len]).is_err(), "{len}");
            assert!(parse_qemu(0, &good[..len]).is_err(), "{len}");
        }
        let mut bad = good.clone();
        bad[4..8].copy_from_slice(&4_u32.to_le_bytes());
        assert_eq!(
            parse_outpatch(&bad),
            Err(NoteError::Short { found: bad.len() })
        );
        bad[0] = 9;
        assert_eq!(parse_outpatch(&bad), Err(NoteError::Version { found: 9 }));
    }
}
