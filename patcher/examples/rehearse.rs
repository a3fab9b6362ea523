//! Applies and reverts a livepatch module on a dump of a guest, with the guest's own part played by this program; the dump stays
//! as it is. Then lets every single operation of the machine fail in turn and compares memory.
//!
//! `rehearse RAM REGS MODULE.ko`: RAM holds guest-physical memory from 0 on, REGS a line of `name=value` for each vCPU.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use introspect::{PatchState, PhysMemory, Unbacked, VcpuRegs};
use patcher::{Machine, MachineError, PatchPhase, Patcher};
use vm_memory::GuestAddress;

const HIDDEN: u64 = 1 << 36;
const PAGE: usize = 4096;

/// A dump, and what was written over it.
struct Memory {
    file: File,
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
    hidden: u64,
}

impl Memory {
    fn page(&self, at: u64) -> Option<Vec<u8>> {
        if let Some(page) = self.pages.get(&at) {
            return Some(page.clone());
        }
        let mut page = vec![0; PAGE];
        if at < self.len {
            self.file.read_exact_at(&mut page, at).ok()?;
            return Some(page);
        }
        (at >= HIDDEN && at < HIDDEN + self.hidden).then_some(page)
    }

    /// Pages of RAM that are not as in the dump, hidden memory aside.
    fn changed(&self) -> usize {
        let differs = |(at, page): &(&u64, &Vec<u8>)| {
            let mut old = vec![0; PAGE];
            **at < self.len && (self.file.read_exact_at(&mut old, **at).is_err() || old != **page)
        };
        self.pages.iter().filter(differs).count()
    }
}

impl PhysMemory for Memory {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), Unbacked> {
        let unbacked = Unbacked {
            gpa,
            len: buf.len(),
        };
        let end = gpa.0.checked_add(buf.len() as u64).ok_or(unbacked)?;
        let first = gpa.0 / PAGE as u64 * PAGE as u64;
        if end <= self.len && self.pages.range(first..end).next().is_none() {
            return self.file.read_exact_at(buf, gpa.0).map_err(|_| unbacked);
        }
        let (mut at, mut rest) = (gpa.0, buf);
        while !rest.is_empty() {
            let offset = (at % PAGE as u64) as usize;
            let page = self.page(at - offset as u64).ok_or(unbacked)?;
            let len = rest.len().min(PAGE - offset);
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&page[offset..offset + len]);
            at += len as u64;
            rest = later;
        }
        Ok(())
    }
}

struct Dump {
    memory: Memory,
    vcpus: Vec<VcpuRegs>,
    paused: u32,
    ops: usize,
    fail_at: Option<usize>,
    interrupts: Vec<(u32, u8)>,
}

impl Dump {
    fn open(ram: &str, regs: &str) -> anyhow::Result<Dump> {
        let file = File::open(ram).context("RAM")?;
        let len = file.metadata()?.len();
        let lines = std::fs::read_to_string(regs).context("REGS")?;
        Ok(Dump {
            memory: Memory {
                file,
                len,
                pages: BTreeMap::new(),
                hidden: 0,
            },
            vcpus: lines.lines().map(vcpu).collect(),
            paused: 0,
            ops: 0,
            fail_at: None,
            interrupts: Vec::new(),
        })
    }

    fn act(&mut self) -> Result<(), MachineError> {
        self.ops += 1;
        match self.fail_at {
            Some(at) if at + 1 == self.ops => Err(MachineError::Vcpu("made to fail".into())),
            _ => Ok(()),
        }
    }

    fn poke(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Option<()> {
        let (mut at, mut rest) = (gpa.0, bytes);
        while !rest.is_empty() {
            let offset = (at % PAGE as u64) as usize;
            let start = at - offset as u64;
            let mut page = self.memory.page(start)?;
            let len = rest.len().min(PAGE - offset);
            let (now, later) = rest.split_at(len);
            page[offset..offset + len].copy_from_slice(now);
            self.memory.pages.insert(start, page);
            at += len as u64;
            rest = later;
        }
        Some(())
    }
}

fn vcpu(line: &str) -> VcpuRegs {
    let values: BTreeMap<&str, u64> = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter_map(|(name, value)| {
            let value = match value.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => value.parse(),
            };
            Some((name, value.ok()?))
        })
        .collect();
    let get = |name| values.get(name).copied().unwrap_or(0);
    VcpuRegs {
        index: get("cpu") as u32,
        rax: get("rax"),
        rbx: get("rbx"),
        rcx: get("rcx"),
        rdx: get("rdx"),
        rsi: get("rsi"),
        rdi: get("rdi"),
        rsp: get("rsp"),
        rbp: get("rbp"),
        r8: get("r8"),
        r9: get("r9"),
        r10: get("r10"),
        r11: get("r11"),
        r12: get("r12"),
        r13: get("r13"),
        r14: get("r14"),
        r15: get("r15"),
        rip: get("rip"),
        rflags: get("rflags"),
        cpl: get("cpl") as u8,
        cr0: get("cr0"),
        cr3: get("cr3"),
        cr4: get("cr4"),
        efer: get("efer"),
        fs_base: get("fs_base"),
        gs_base: get("gs_base"),
        kernel_gs_base: get("kernel_gs_base"),
        idt_base: get("idt_base"),
        idt_limit: get("idt_limit") as u16,
        online: true,
        ..VcpuRegs::default()
    }
}

impl Machine for Dump {
    type Memory = Memory;

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.act()?;
        self.paused += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.paused -= 1;
        Ok(())
    }

    fn vcpus(&mut self) -> Result<Vec<VcpuRegs>, MachineError> {
        self.act()?;
        assert!(self.paused > 0, "registers read from a running guest");
        Ok(self.vcpus.clone())
    }

    fn write(&mut self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), MachineError> {
        self.act()?;
        assert!(self.paused > 0 || gpa.0 >= HIDDEN, "running guest written");
        let len = bytes.len();
        self.poke(gpa, bytes)
            .ok_or(MachineError::Memory { gpa, len })
    }

    fn add_hidden_memory(&mut self, len: u64) -> Result<GuestAddress, MachineError> {
        self.act()?;
        self.memory.hidden += len;
        Ok(GuestAddress(HIDDEN + self.memory.hidden - len))
    }

    fn remove_hidden_memory(&mut self, _: GuestAddress) -> Result<(), MachineError> {
        self.act()
    }

    fn interrupt(&mut self, index: u32, vector: u8) -> Result<(), MachineError> {
        self.act()?;
        self.interrupts.push((index, vector));
        Ok(())
    }
}

/// The guest's part: whoever is marked crosses the boundary.
fn cross_boundary(patcher: &mut Patcher, dump: &mut Dump) -> anyhow::Result<usize> {
    let tasks = patcher.tasks(dump)?;
    let kernel = patcher.kernel(dump)?;
    let livepatch = kernel.livepatch.as_ref().context("no livepatch")?;
    let flags = kernel.layout.task.thread_flags;
    let memory = kernel.memory(&dump.memory);
    let target = memory.i32(livepatch.target_state)?;
    let mut writes = Vec::new();
    for task in tasks {
        let marked = task.tif >> livepatch.pending_bit & 1 == 1;
        if marked {
            let tif = task.tif & !(1 << livepatch.pending_bit);
            let at = memory.translate(flags.of(task.addr))?.gpa;
            writes.push((at, tif.to_le_bytes().to_vec()));
            let at = memory.translate(livepatch.patch_state.of(task.addr))?.gpa;
            writes.push((at, target.to_le_bytes().to_vec()));
        }
    }
    for (at, bytes) in &writes {
        dump.poke(*at, bytes).context("poke")?;
    }
    Ok(writes.len() / 2)
}

/// Polls to the end, with the guest doing its part after a few looks.
fn finish(patcher: &mut Patcher, dump: &mut Dump) -> anyhow::Result<()> {
    for look in 0..10 {
        if patcher.poll(dump)?.is_none() {
            return Ok(());
        }
        if look == 2 {
            let moved = cross_boundary(patcher, dump)?;
            println!("  {moved} tasks crossed the boundary");
        }
    }
    for task in patcher.status().into_iter().flat_map(|s| s.tasks).take(10) {
        println!("  {task:?}");
    }
    bail!("the transition does not end")
}

fn report(patcher: &Patcher, what: &str, took: Duration) {
    for status in patcher.status() {
        let mut ways = BTreeMap::new();
        for task in &status.tasks {
            *ways.entry(format!("{:?}", task.way)).or_insert(0) += 1;
        }
        println!(
            "{what}: {} {:?} in {took:?}, tasks {ways:?}, pauses {:?}",
            status.name, status.phase, status.pauses
        );
    }
}

fn rehearse(ram: &str, regs: &str, module: &[u8]) -> anyhow::Result<()> {
    let mut dump = Dump::open(ram, regs)?;
    let mut patcher = Patcher::new();
    let start = Instant::now();
    println!(
        "{} ({:?})",
        patcher.banner(&mut dump)?.trim(),
        start.elapsed()
    );
    let tasks = patcher.tasks(&mut dump)?;
    let reliable = patcher
        .stacks(&mut dump)?
        .iter()
        .filter(|stack| stack.verdict == introspect::Verdict::Reliable)
        .count();
    println!("{} tasks, {reliable} stacks reliable", tasks.len());
    for round in 0..3 {
        let start = Instant::now();
        let name = patcher.apply(&mut dump, module)?;
        for task in patcher.status().into_iter().flat_map(|s| s.tasks) {
            if let Some(blocker) = &task.blocker {
                println!("  {} ({}): {blocker}", task.comm, task.pid);
            }
        }
        finish(&mut patcher, &mut dump)?;
        report(&patcher, "apply", start.elapsed());
        println!("  {} pages changed", dump.memory.changed());
        for stack in patcher.stacks(&mut dump)? {
            ensure!(
                stack.task.patch_state == Some(PatchState::Idle),
                "{:?} keeps its state",
                stack.task
            );
        }
        let start = Instant::now();
        patcher.revert(&mut dump, &name)?;
        finish(&mut patcher, &mut dump)?;
        report(&patcher, "revert", start.elapsed());
        ensure!(
            patcher
                .status()
                .iter()
                .all(|s| s.phase == PatchPhase::Reverted),
            "not reverted"
        );
        // The entry of the page table that maps the hidden memory stays.
        println!("round {round}: {} pages changed", dump.memory.changed());
        ensure!(dump.memory.changed() <= 1, "something stayed behind");
    }
    println!("interrupts {:?}", dump.interrupts);
    Ok(())
}

/// Every operation of an `apply` fails in turn.
fn faults(ram: &str, regs: &str, module: &[u8]) -> anyhow::Result<()> {
    let mut failed = 0;
    for at in 0.. {
        let mut dump = Dump::open(ram, regs)?;
        let mut patcher = Patcher::new();
        patcher.banner(&mut dump)?;
        dump.fail_at = Some(dump.ops + at);
        let start = dump.ops;
        match patcher.apply(&mut dump, module) {
            Err(error) => {
                failed += 1;
                ensure!(
                    dump.memory.changed() == 0,
                    "operation {at}: {error}: memory changed"
                );
                ensure!(dump.paused == 0, "operation {at}: {error}: left paused");
                dump.fail_at = None;
                patcher
                    .apply(&mut dump, module)
                    .with_context(|| format!("after operation {at}"))?;
            }
            Ok(_) if dump.ops <= start + at => {
                println!("{failed} operations made to fail, each time memory as before");
                return Ok(());
            }
            Ok(_) => println!("operation {at} failed and was not needed"),
        }
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [ram, regs, module] = args.as_slice() else {
        bail!("rehearse RAM REGS MODULE.ko");
    };
    let module = std::fs::read(module)?;
    rehearse(ram, regs, &module)?;
    faults(ram, regs, &module)
}
