//! A mock machine for this crate's unit tests: a byte array with page tables. It records every
//! operation and can make any single one fail.

use introspect::memory::AddressSpace;
use introspect::memory::KernelMemory;
use introspect::x86::PAGE_SIZE;
use introspect::{Gva, OutOfBounds, PhysMemory, Task, TaskKind, VcpuRegs};
use vm_memory::GuestAddress;

use crate::machine::{Machine, MachineError};

/// A task that is not running and has no stack.
pub(crate) fn task(pid: i32, kind: TaskKind) -> Task {
    Task {
        addr: Gva::NULL,
        pid,
        tgid: pid,
        comm: format!("t{pid}"),
        kind,
        state: 0,
        exit_state: 0,
        flags: 0,
        tif: 0,
        on_cpu: false,
        cpu: None,
        vcpu: None,
        patch_state: None,
        sp: Gva::NULL,
        stack: Gva::NULL,
    }
}

/// The guest-physical address at which hidden memory begins.
const HIDDEN: u64 = 1 << 40;

/// RAM from address 0 on, and hidden memory in slots of 2 MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ram {
    pub(crate) low: Vec<u8>,
    pub(crate) hidden: Vec<Vec<u8>>,
}

impl Ram {
    fn slice(&mut self, gpa: GuestAddress, len: usize) -> Option<&mut [u8]> {
        let (bytes, offset) = match gpa.0.checked_sub(HIDDEN) {
            None => (&mut self.low, gpa.0),
            Some(at) => (
                self.hidden.get_mut(usize::try_from(at >> 21).ok()?)?,
                at & ((2 << 20) - 1),
            ),
        };
        let start = usize::try_from(offset).ok()?;
        bytes.get_mut(start..start.checked_add(len)?)
    }
}

impl PhysMemory for Ram {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), OutOfBounds> {
        let len = buf.len();
        let unbacked = OutOfBounds { gpa, len };
        let (bytes, offset) = match gpa.0.checked_sub(HIDDEN) {
            None => (&self.low, gpa.0),
            Some(at) => (
                self.hidden.get((at >> 21) as usize).ok_or(unbacked)?,
                at & ((2 << 20) - 1),
            ),
        };
        let start = usize::try_from(offset).map_err(|_| unbacked)?;
        let end = start.checked_add(len).ok_or(unbacked)?;
        buf.copy_from_slice(bytes.get(start..end).ok_or(unbacked)?);
        Ok(())
    }
}

/// An operation on the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Pause,
    Resume,
    Vcpus,
    Write(GuestAddress, usize),
    AddHidden,
    RemoveHidden,
    Interrupt(u32, u8),
}

/// A machine that has no guest.
#[derive(Debug)]
pub(crate) struct Mock {
    pub(crate) ram: Ram,
    pub(crate) ops: Vec<Op>,
    /// The number, from 0, of the operation that fails.
    pub(crate) fail_at: Option<usize>,
    pub(crate) paused: u32,
    pub(crate) vcpus: Vec<VcpuRegs>,
    next_table: u64,
}

/// The page tables' top level; the tables follow it.
const ROOT: u64 = 0x1000;
/// Pages for tables.
const TABLES: u64 = 32;

impl Mock {
    /// `len` bytes of RAM with empty page tables.
    pub(crate) fn new(len: usize) -> Mock {
        Mock {
            ram: Ram {
                low: vec![0; len],
                hidden: Vec::new(),
            },
            ops: Vec::new(),
            fail_at: None,
            paused: 0,
            vcpus: vec![VcpuRegs::default()],
            next_table: ROOT + PAGE_SIZE,
        }
    }

    /// The first byte that no page table uses.
    pub(crate) const FREE: u64 = ROOT + TABLES * PAGE_SIZE;

    /// Kernel memory through the page tables.
    pub(crate) fn kernel_memory(&self) -> KernelMemory<'_> {
        let root = GuestAddress(ROOT);
        KernelMemory::new(&self.ram, AddressSpace { root, levels: 4 })
    }

    pub(crate) fn word(&self, gpa: u64) -> u64 {
        let mut raw = [0; 8];
        self.ram.read(GuestAddress(gpa), &mut raw).unwrap();
        u64::from_le_bytes(raw)
    }

    pub(crate) fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let to = self.ram.slice(GuestAddress(gpa), bytes.len()).unwrap();
        to.copy_from_slice(bytes);
    }

    /// The page table that `entry` points to; made when there is none.
    fn table_below(&mut self, entry: u64) -> u64 {
        if self.word(entry) == 0 {
            let table = self.next_table;
            self.next_table += PAGE_SIZE;
            assert!(table < Self::FREE, "out of page tables");
            self.put(entry, &(table | 0x3).to_le_bytes());
        }
        self.word(entry) & !0xfff
    }

    /// The address of the page directory for `gva`, whose entries map 2 MiB each.
    pub(crate) fn directory(&mut self, gva: Gva) -> u64 {
        let index = |shift: u32| (gva.0 >> shift & 0x1ff) * 8;
        let upper = self.table_below(ROOT + index(39));
        self.table_below(upper + index(30))
    }

    /// Maps one page of 4 KiB.
    pub(crate) fn map(&mut self, gva: Gva, gpa: u64, bits: u64) {
        let directory = self.directory(gva);
        let table = self.table_below(directory + (gva.0 >> 21 & 0x1ff) * 8);
        let entry = table + (gva.0 >> 12 & 0x1ff) * 8;
        self.put(entry, &(gpa | bits).to_le_bytes());
    }

    /// Records `op`, and fails if it is the one that is to fail.
    fn record(&mut self, op: Op) -> Result<(), MachineError> {
        let number = self.ops.len();
        self.ops.push(op);
        if self.fail_at == Some(number) {
            return Err(MachineError::Vcpu("made to fail".into()));
        }
        Ok(())
    }
}

impl Machine for Mock {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.record(Op::Pause)?;
        self.paused += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.paused = self.paused.checked_sub(1).expect("resumed without a pause");
        self.record(Op::Resume)
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.record(Op::Vcpus)?;
        assert!(self.paused > 0, "registers read from a running guest");
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        self.record(Op::Write(gpa, bytes.len()))?;
        assert!(
            self.paused > 0 || gpa.0 >= HIDDEN,
            "RAM of a running guest written"
        );
        let len = bytes.len();
        let to = self.ram.slice(gpa, len);
        to.ok_or(MachineError::Memory { gpa, len })?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        self.record(Op::AddHidden)?;
        assert_eq!(len, 2 << 20);
        self.ram.hidden.push(vec![0; 2 << 20]);
        Ok(GuestAddress(
            HIDDEN + ((self.ram.hidden.len() as u64 - 1) << 21),
        ))
    }

    fn remove_hidden_memory(&mut self, _: GuestAddress) -> Result<(), MachineError> {
        self.record(Op::RemoveHidden)?;
        self.ram.hidden.pop();
        Ok(())
    }

    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError> {
        self.record(Op::Interrupt(index, vector))
    }
}
