//! One step of a walk: from a frame to its caller, by one ORC entry.
//!
//! This module knows registers and the meaning of ORC entries; it must not know where stacks are,
//! what code is where, or when a stack is reliable: it reads memory through [`StackMemory`], which
//! decides what may be read. It follows `arch/x86/kernel/unwind_orc.c: unwind_next_frame`.

use crate::addr::Gva;
use crate::unwind::orc::{OrcBase, OrcEntry, OrcKind};
use crate::unwind::stack::Unreliable;
use crate::vcpu::VcpuRegs;

/// Offsets in `pt_regs` as the entry code pushes it; ptrace makes this layout permanent.
pub(crate) mod pt_regs {
    /// Offset of `r13`.
    pub(crate) const R13: u64 = 0x10;
    /// Offset of `bp`.
    pub(crate) const BP: u64 = 0x20;
    /// Offset of `r10`.
    pub(crate) const R10: u64 = 0x38;
    /// Offset of `ax`.
    pub(crate) const AX: u64 = 0x50;
    /// Offset of `dx`.
    pub(crate) const DX: u64 = 0x60;
    /// Offset of `di`.
    pub(crate) const DI: u64 = 0x70;
    /// Offset of the part that the processor pushed.
    pub(crate) const IRET: u64 = 0x80;
}

/// Offsets in what the processor pushes on an interrupt.
mod iret {
    pub(crate) const IP: u64 = 0x00;
    pub(crate) const CS: u64 = 0x08;
    pub(crate) const SP: u64 = 0x18;
    pub(crate) const SIZE: u64 = 0x28;
}

/// The memory of the stacks that a walk may read.
pub(crate) trait StackMemory {
    /// Reads the eight bytes at `at`.
    ///
    /// # Errors
    /// [`Unreliable`] when `at` is on no stack that this walk may be on now, or cannot be read.
    fn word(&mut self, at: Gva) -> Result<u64, Unreliable>;
}

/// The registers that an ORC entry can refer to, in a frame where they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedRegs {
    bp: u64,
    r10: u64,
    r13: u64,
    ax: u64,
    dx: u64,
    di: u64,
}

impl From<&VcpuRegs> for SavedRegs {
    fn from(regs: &VcpuRegs) -> Self {
        SavedRegs {
            bp: regs.rbp,
            r10: regs.r10,
            r13: regs.r13,
            ax: regs.rax,
            dx: regs.rdx,
            di: regs.rdi,
        }
    }
}

/// The position of a walk: one frame and its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The instruction pointer or return address.
    pub ip: Gva,
    /// The stack pointer at that instruction.
    pub sp: Gva,
    /// The frame pointer register.
    pub bp: u64,
    /// Whether `ip` is an exact position, not a return address.
    pub exact: bool,
    /// Where on the stack a function that was called finds its return address `ip`; `None` for any
    /// other position.
    pub retp: Option<Gva>,
    /// The other registers, if they are known for this frame.
    pub regs: Option<SavedRegs>,
}

/// The result of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A caller in the kernel.
    Frame(Cursor),
    /// The entry from user mode.
    User {
        /// The first address after the saved user registers.
        regs_end: Gva,
    },
}

impl Cursor {
    /// The position of a vCPU that is in kernel mode.
    #[must_use]
    pub(crate) fn from_vcpu(regs: &VcpuRegs) -> Cursor {
        Cursor {
            ip: Gva(regs.rip),
            sp: Gva(regs.rsp),
            bp: regs.rbp,
            exact: true,
            retp: None,
            regs: Some(SavedRegs::from(regs)),
        }
    }

    /// The address at which to look up code and unwind data: a call may be the last instruction of
    /// its function, and its return address is then outside of it.
    #[must_use]
    pub(crate) fn code(&self) -> Gva {
        if self.exact { self.ip } else { self.ip.sub(1) }
    }

    /// The caller's position.
    ///
    /// `entry` must be one that can be unwound: neither `Undefined` nor `End`.
    ///
    /// # Errors
    /// [`Unreliable`] when [`StackMemory`] refuses a read, a register is needed that is not known
    /// in this frame, or the entry cannot be unwound.
    pub(crate) fn step(
        &self,
        entry: &OrcEntry,
        stacks: &mut impl StackMemory,
    ) -> Result<Step, Unreliable> {
        let frame = self.frame_address(entry, stacks)?;
        match entry.kind {
            OrcKind::Call => {
                let retp = frame.sub(8);
                let ip = Gva(stacks.word(retp)?);
                let caller = self.caller(ip, frame, None, frame, entry, stacks)?;
                Ok(Step::Frame(Cursor {
                    retp: Some(retp).filter(|_| !caller.exact),
                    ..caller
                }))
            }
            OrcKind::Regs => {
                let regs = saved_regs(frame, stacks)?;
                self.interrupted_frame(frame.add(pt_regs::IRET), Some(regs), frame, entry, stacks)
            }
            // Registers saved by an earlier full frame still belong to the interrupted code:
            // nothing ran in between.
            OrcKind::PartialRegs => self.interrupted_frame(frame, self.regs, frame, entry, stacks),
            OrcKind::Undefined | OrcKind::End => Err(Unreliable::NoOrc(self.ip)),
        }
    }

    fn frame_address(
        &self,
        entry: &OrcEntry,
        stacks: &mut impl StackMemory,
    ) -> Result<Gva, Unreliable> {
        let offset = i64::from(entry.sp_offset);
        let known = |pick: fn(&SavedRegs) -> u64| {
            self.regs
                .as_ref()
                .map(|regs| Gva(pick(regs)))
                .ok_or(Unreliable::MissingRegister(self.ip))
        };
        Ok(match entry.sp_base {
            OrcBase::Sp => self.sp.offset(offset),
            OrcBase::Bp => Gva(self.bp).offset(offset),
            OrcBase::SpIndirect => Gva(stacks.word(self.sp)?).offset(offset),
            OrcBase::BpIndirect => Gva(stacks.word(Gva(self.bp).offset(offset))?),
            OrcBase::Ax => known(|regs| regs.ax)?,
            OrcBase::Dx => known(|regs| regs.dx)?,
            OrcBase::Di => known(|regs| regs.di)?,
            OrcBase::R10 => known(|regs| regs.r10)?,
            OrcBase::R13 => known(|regs| regs.r13)?,
            OrcBase::Undefined | OrcBase::PrevSp => return Err(Unreliable::NoOrc(self.ip)),
        })
    }

    fn interrupted_frame(
        &self,
        at: Gva,
        regs: Option<SavedRegs>,
        frame: Gva,
        entry: &OrcEntry,
        stacks: &mut impl StackMemory,
    ) -> Result<Step, Unreliable> {
        let ip = Gva(stacks.word(at.add(iret::IP))?);
        let cs = stacks.word(at.add(iret::CS))?;
        let sp = Gva(stacks.word(at.add(iret::SP))?);
        // FRED stores more than the selector in the slot of cs; the privilege level is in the same
        // two bits.
        if cs & 3 != 0 {
            return Ok(Step::User {
                regs_end: at.add(iret::SIZE),
            });
        }
        self.caller(ip, sp, regs, frame, entry, stacks)
            .map(Step::Frame)
    }

    fn caller(
        &self,
        ip: Gva,
        sp: Gva,
        regs: Option<SavedRegs>,
        frame: Gva,
        entry: &OrcEntry,
        stacks: &mut impl StackMemory,
    ) -> Result<Cursor, Unreliable> {
        let offset = i64::from(entry.bp_offset);
        let bp = match entry.bp_base {
            OrcBase::PrevSp => stacks.word(frame.offset(offset))?,
            OrcBase::Bp => stacks.word(Gva(self.bp).offset(offset))?,
            _ => regs.map_or(self.bp, |regs| regs.bp),
        };
        Ok(Cursor {
            ip,
            sp,
            bp,
            exact: entry.signal,
            retp: None,
            regs,
        })
    }
}

fn saved_regs(at: Gva, stacks: &mut impl StackMemory) -> Result<SavedRegs, Unreliable> {
    Ok(SavedRegs {
        bp: stacks.word(at.add(pt_regs::BP))?,
        r10: stacks.word(at.add(pt_regs::R10))?,
        r13: stacks.word(at.add(pt_regs::R13))?,
        ax: stacks.word(at.add(pt_regs::AX))?,
        dx: stacks.word(at.add(pt_regs::DX))?,
        di: stacks.word(at.add(pt_regs::DI))?,
    })
}

#[cfg(test)]
mod tests;
