//! vCPU threads, pauses and exits, tested with guests of a few bytes of machine code on the host's
//! KVM.

mod console;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;

use introspect::PhysMemory;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use patcher::{Machine, MachineError};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::console::output::OutputWriter;
use crate::devices::legacy::i8042::I8042;
use crate::devices::legacy::power::Power;
use crate::devices::legacy::serial::Com1;
use crate::devices::{Bus, Buses, Device, Effect};
use crate::vm::console_stall;
use crate::vm::handle::VmHandle;
use crate::vm::shared::{Shared, VmState};
use crate::vm::{Vm, open_kvm};

pub(crate) const CODE: u64 = 0x1000;
const RAM: u64 = 2 << 20;
const SOON: Duration = Duration::from_secs(20);

/// A guest under test. Every vCPU starts in real mode at [`CODE`], with its index in BX.
struct Guest {
    shared: Arc<Shared>,
    reports: Receiver<ExitedVcpu>,
    output: Output,
    console: UnixStream,
    _writer: OutputWriter,
}

/// A port that reads as 0, 1, 2, …
struct Counter(u8);

impl Device for Counter {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.0;
            self.0 = self.0.wrapping_add(1);
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Effect {
        Effect::None
    }
}

impl Guest {
    /// `runnable` of `cpus` vCPUs run `code`; the others wait for INIT, as application processors
    /// do.
    fn new(code: &[u8], cpus: u8, runnable: u8) -> Guest {
        let kvm = open_kvm().expect("these tests need /dev/kvm");
        let (vm, vcpus) = Vm::new(&kvm, RAM, cpus).unwrap();
        vm.memory()
            .ram()
            .write_slice(code, GuestAddress(CODE))
            .unwrap();
        for (index, (vcpu, _)) in (0..).zip(&vcpus).take(runnable.into()) {
            real_mode(vcpu, index);
        }
        Guest::start(vm, vcpus)
    }

    /// A guest whose vCPU 0 is in 64-bit mode at [`CODE`] with the boot page tables.
    fn long_mode(code: &[u8]) -> Guest {
        let kvm = open_kvm().expect("these tests need /dev/kvm");
        let (vm, vcpus) = Vm::new(&kvm, RAM, 1).unwrap();
        let ram = vm.memory().ram();
        ram.write_slice(code, GuestAddress(CODE)).unwrap();
        crate::boot::vcpu_state::write_boot_tables(ram).unwrap();
        crate::boot::vcpu_state::set_msrs(&vcpus[0].0).unwrap();
        crate::boot::vcpu_state::set_boot_state(&vcpus[0].0, GuestAddress(CODE)).unwrap();
        Guest::start(vm, vcpus)
    }

    fn start(vm: Vm, vcpus: Vec<(VcpuFd, ImmediateExit)>) -> Guest {
        let (ours, console) = UnixStream::pair().unwrap();
        let (output, writer) = Output::start(ours.into()).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let com1 = Com1::new(vm.irq_line(4).unwrap(), output.clone(), event()).unwrap();
        let pio = Bus::default()
            .with(0x3f8, 8, Arc::new(Mutex::new(com1)))
            .with(0x60, 5, Arc::new(Mutex::new(I8042)))
            .with(0x600, 3, Arc::new(Mutex::new(Power)))
            .with(0x10, 1, Arc::new(Mutex::new(Counter(0))));
        let buses = Arc::new(Buses {
            pio,
            mmio: Bus::default(),
        });
        let (sender, reports) = channel();
        let exits = ExitReporter {
            reports: sender,
            event: event(),
        };
        let vcpus = Vcpus::start(vcpus, &buses, &output, &exits).unwrap();
        let shared = Arc::new(Shared {
            vcpus,
            vm,
            state: Mutex::new(VmState::Running),
            stop: event(),
        });
        console_stall::start(&shared, &output).unwrap();
        Guest {
            shared,
            reports,
            output,
            console,
            _writer: writer,
        }
    }

    fn resume(&self) -> &Vcpus {
        self.vcpus().resume().unwrap();
        self.vcpus()
    }

    fn vcpus(&self) -> &Vcpus {
        &self.shared.vcpus
    }

    fn handle(&self) -> VmHandle {
        VmHandle::new(Arc::clone(&self.shared))
    }

    fn byte(&self, gpa: u64) -> u8 {
        let mut byte = [0];
        self.shared
            .vm
            .memory()
            .read(GuestAddress(gpa), &mut byte)
            .unwrap();
        byte[0]
    }

    fn exited(&self) -> ExitedVcpu {
        self.reports.recv_timeout(SOON).expect("a vCPU exits")
    }

    /// Waits until the guest has written `value` at `gpa`.
    fn wait_for(&self, gpa: u64, value: u8) {
        let deadline = Instant::now() + SOON;
        while self.byte(gpa) != value {
            assert!(Instant::now() < deadline, "the guest does not write it");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Starts `vcpu` in real mode at [`CODE`], with `index` in BX.
pub(crate) fn real_mode(vcpu: &VcpuFd, index: u64) {
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_bindings::kvm_regs {
        rip: CODE,
        rbx: index,
        rsp: 0x8000,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let mp_state = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    vcpu.set_mp_state(mp_state).unwrap();
}

/// mov byte [bx + 0x2000], 1 ; jmp $
const SPIN: &[u8] = &[0xc6, 0x87, 0x00, 0x20, 0x01, 0xeb, 0xfe];

#[test]
fn a_spinning_guest_stops_at_once_and_its_registers_can_be_read() {
    let guest = Guest::new(SPIN, 4, 4);
    let vcpus = guest.resume();
    (0..4).for_each(|index| guest.wait_for(0x2000 + index, 1));
    let mut answers = Vec::new();
    for _ in 0..300 {
        let requested = Instant::now();
        vcpus.pause().unwrap();
        answers.push(requested.elapsed());
        let regs = vcpus.regs().unwrap();
        assert_eq!(regs.len(), 4);
        for (index, regs) in (0_u64..).zip(&regs) {
            assert_eq!(
                (regs.rip, regs.rbx, u64::from(regs.index)),
                (CODE + 5, index, index)
            );
            assert!(regs.online && !regs.foreign);
        }
        vcpus.resume().unwrap();
    }
    answers.sort();
    println!(
        "request to answer, 4 vCPUs: p50 {:?}, p99 {:?}",
        answers[150], answers[297]
    );
    let stats = vcpus.stats();
    assert_eq!(stats.count, 300);
    assert!(stats.longest <= stats.total && stats.slowest_answer >= answers[297]);
}

#[test]
fn halted_and_not_yet_started_vcpus_stop_too() {
    // cli ; mov byte [bx + 0x2000], 1 ; hlt
    let guest = Guest::new(&[0xfa, 0xc6, 0x87, 0x00, 0x20, 0x01, 0xf4], 3, 2);
    let vcpus = guest.resume();
    (0..2).for_each(|index| guest.wait_for(0x2000 + index, 1));
    for _ in 0..50 {
        vcpus.pause().unwrap();
        let online: Vec<_> = vcpus
            .regs()
            .unwrap()
            .iter()
            .map(|regs| regs.online)
            .collect();
        assert_eq!(online, [true, true, false]);
        vcpus.resume().unwrap();
    }
}

#[test]
fn a_storm_of_pauses_loses_no_input() {
    // mov di, 0x3000 ; next: in al, 0x10 ; mov [di], al ; inc di ; cmp di, 0x7000 ; jne next ;
    // mov byte [0x2000], 1 ; hlt
    let code = [
        0xbf, 0x00, 0x30, 0xe4, 0x10, 0x88, 0x05, 0x47, 0x81, 0xff, 0x00, 0x70, 0x75, 0xf5, 0xc6,
        0x06, 0x00, 0x20, 0x01, 0xf4,
    ];
    let guest = Guest::new(&code, 1, 1);
    let vcpus = guest.resume();
    // Pauses may come so fast that the guest takes several of them for one byte: it reads the rest
    // after the last pause.
    for _ in 0..4000 {
        vcpus.pause().unwrap();
        // The port's value is in AL or already in memory: the instruction has completed.
        let regs = vcpus.regs().unwrap();
        let taken = (regs[0].rdi & 0xffff).saturating_sub(0x3000);
        if regs[0].rip == CODE + 5 {
            assert_eq!(regs[0].rax & 0xff, taken & 0xff);
        }
        vcpus.resume().unwrap();
    }
    guest.wait_for(0x2000, 1);
    let mut got = vec![0; 0x4000];
    guest
        .shared
        .vm
        .memory()
        .read(GuestAddress(0x3000), &mut got)
        .unwrap();
    assert!(got.iter().copied().eq((0..=255_u8).cycle().take(0x4000)));
}

#[test]
fn pauses_nest_across_users_and_a_dropped_machine_releases_its_own() {
    let guest = Guest::new(SPIN, 2, 2);
    guest.resume();
    let handle = guest.handle();
    let mut first = handle.machine();
    let mut second = first.clone();
    assert_eq!(
        first.vcpus(),
        Err(MachineError::Vcpu("the vCPUs are not paused".to_owned()))
    );
    assert!(
        first.write(GuestAddress(0x2000), &[0]).is_err(),
        "a running guest is not written to"
    );
    assert!(first.resume().is_err());
    first.pause().unwrap();
    first.pause().unwrap();
    assert!(
        second.vcpus().is_err(),
        "another machine's pause is not this one's"
    );
    second.pause().unwrap();
    handle.pause().unwrap();
    handle.pause().unwrap();
    assert_eq!(handle.state(), VmState::Paused);
    drop(first);
    assert_eq!(second.vcpus().unwrap().len(), 2);
    second.write(GuestAddress(0x2000), &[7]).unwrap();
    assert!(matches!(
        second.write(GuestAddress(RAM - 1), &[1, 2]),
        Err(MachineError::Memory { .. })
    ));
    second.resume().unwrap();
    assert_eq!(guest.byte(0x2000), 7);
    handle.resume().unwrap();
    handle.resume().unwrap();
    assert_eq!(handle.state(), VmState::Running);
    assert_eq!(
        guest.vcpus().stats().count,
        1,
        "one stop of the guest in all"
    );
    assert_eq!(guest.vcpus().resume(), Err(PauseError::NotPaused));
}

#[test]
fn new_code_is_run_after_a_pause() {
    let guest = Guest::new(SPIN, 1, 1);
    guest.resume();
    guest.wait_for(0x2000, 1);
    let mut machine = guest.handle().machine();
    machine.pause().unwrap();
    // Over the `jmp $`: mov byte [0x2000], 2 ; jmp $
    machine
        .write(
            GuestAddress(CODE + 5),
            &[0xc6, 0x06, 0x00, 0x20, 0x02, 0xeb, 0xfe],
        )
        .unwrap();
    machine.resume().unwrap();
    guest.wait_for(0x2000, 2);
}

#[test]
fn the_guest_sees_hidden_memory_that_is_mapped_for_it() {
    let base = 4_u64 << 30;
    // mov rbx, 4 GiB ; again: mov al, [rbx] ; cmp al, 0x5a ; jne again ; mov [0x2000], al ; jmp $
    let code = [
        0x48, 0xbb, 0, 0, 0, 0, 1, 0, 0, 0, 0x8a, 0x03, 0x3c, 0x5a, 0x75, 0xfa, 0x88, 0x04, 0x25,
        0x00, 0x20, 0, 0, 0xeb, 0xfe,
    ];
    let guest = Guest::long_mode(&code);
    let mut machine = guest.handle().machine();
    assert!(machine.add_hidden_memory(4096).is_err());
    let gpa = machine.add_hidden_memory(2 << 20).unwrap();
    assert_eq!(gpa.0, base);
    // A page directory of our own for the fifth GiB.
    machine.pause().unwrap();
    machine
        .write(
            GuestAddress(crate::layout::PDPT.0 + 4 * 8),
            &(0x1_0000_u64 | 3).to_le_bytes(),
        )
        .unwrap();
    machine
        .write(GuestAddress(0x1_0000), &(base | 0x83).to_le_bytes())
        .unwrap();
    machine.resume().unwrap();
    guest.resume();
    machine.write(gpa, &[0x5a]).unwrap();
    guest.wait_for(0x2000, 0x5a);
    let mut seen = [0];
    machine.memory().read(gpa, &mut seen).unwrap();
    assert_eq!(seen, [0x5a]);
    let second = machine.add_hidden_memory(4 << 20).unwrap();
    assert_eq!(second.0, base + (2 << 20));
    machine.remove_hidden_memory(second).unwrap();
    assert!(machine.remove_hidden_memory(second).is_err());
    assert!(
        machine.add_hidden_memory(2 << 30).is_err(),
        "more than any patch needs"
    );
    assert_eq!(
        machine.add_hidden_memory(2 << 20).unwrap(),
        second,
        "the address is used again"
    );
}

#[test]
fn a_guest_ends_by_reset_power_off_and_triple_fault() {
    // mov al, 0xfe ; out 0x64, al
    let reset = Guest::new(&[0xb0, 0xfe, 0xe6, 0x64], 2, 1);
    check_exit(&reset, &ExitReason::Reset);
    // mov dx, 0x600 ; mov al, 0x34 ; out dx, al
    let off = Guest::new(&[0xba, 0x00, 0x06, 0xb0, 0x34, 0xee], 2, 1);
    check_exit(&off, &ExitReason::PowerOff);
    // mov al, [8 GiB], with no page table for it and an interrupt table of length 0
    let fault = Guest::long_mode(&[0xa0, 0, 0, 0, 0, 2, 0, 0, 0]);
    check_exit(&fault, &ExitReason::TripleFault);
}

fn check_exit(guest: &Guest, reason: &ExitReason) {
    let vcpus = guest.resume();
    let exited = guest.exited();
    assert_eq!((exited.index, &exited.reason), (0, reason));
    assert!(exited.regs.is_ok());
    vcpus.pause().unwrap();
    assert_eq!(
        vcpus.regs().unwrap().len(),
        usize::try_from(vcpus.count()).unwrap(),
        "a guest that has ended can still be read"
    );
    vcpus.resume().unwrap();
    assert!(guest.reports.try_recv().is_err(), "and ends once");
}

#[test]
fn after_the_end_no_caller_waits() {
    let guest = Guest::new(SPIN, 2, 2);
    let mut machine = guest.handle().machine();
    guest.resume();
    machine.pause().unwrap();
    guest.vcpus().end();
    assert_eq!(
        machine.clone().pause(),
        Err(MachineError::Vcpu("the guest has ended".to_owned()))
    );
    machine.resume().unwrap();
    assert_eq!(guest.vcpus().pause(), Err(PauseError::GuestEnded));
    assert_eq!(guest.byte(CODE), SPIN[0], "its memory can still be read");
}

#[test]
fn interrupts_go_to_vcpus_that_exist() {
    let guest = Guest::new(SPIN, 2, 2);
    let mut machine = guest.handle().machine();
    let error = machine.interrupt(2, 0xfd).unwrap_err();
    assert!(error.to_string().contains("no such vCPU"), "{error}");
    let off = machine.interrupt(0, 0xfd).unwrap_err();
    assert!(
        off.to_string().contains("APIC"),
        "software-disabled after reset: {off}"
    );
}
