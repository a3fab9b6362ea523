//! One vCPU and the thread that runs it: in the guest, stopped on command, or ended.
//!
//! The thread alone touches its vCPU. It knows the buses and the console's back-pressure; of other vCPUs it knows nothing.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use introspect::VcpuRegs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use crate::console::output::Output;
use crate::devices::{Bus, Effect};
use crate::vm::kvm_run::{ImmediateExit, internal_error};
use crate::vm::regs::capture;

/// What a vCPU thread is told.
#[derive(Debug)]
pub enum Command {
    /// Stop outside the guest with no I/O pending, and say so.
    Pause(Sender<Stopped>),
    /// Go on.
    Resume,
    /// Leave the thread.
    Quit,
}

/// A vCPU has stopped.
#[derive(Debug)]
pub struct Stopped {
    /// Which.
    pub index: u32,
    /// When it had left the guest.
    pub at: Instant,
    /// Its registers: they cannot change until it is resumed, so the answer carries them and spares a second round of wakeups.
    pub regs: Result<VcpuRegs, String>,
}

/// Why a vCPU will not enter the guest again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A fault while a double fault was delivered: a PC would reset.
    TripleFault,
    /// KVM met something that it cannot emulate, or is confused.
    InternalError(Option<(u32, Vec<u64>)>),
    /// The processor refused to enter the guest.
    FailEntry(u64),
    /// `KVM_RUN` failed.
    RunFailed(kvm_ioctls::Error),
    /// An exit that this machine has no use for.
    Unexpected(String),
    /// Our own thread panicked.
    Panicked,
}

/// A vCPU has ended, and the machine with it.
#[derive(Debug)]
pub struct ExitedVcpu {
    /// Which; the caller's own bookkeeping when a thread died.
    pub index: u32,
    /// Why.
    pub end: ExitReason,
    /// Its registers at the end.
    pub regs: Result<VcpuRegs, String>,
}

/// Where vCPU threads report their end.
#[derive(Debug)]
pub struct EndReporter {
    /// Takes the report.
    pub reports: Sender<ExitedVcpu>,
    /// Wakes who reads the reports.
    pub wake: EventFd,
}

impl EndReporter {
    /// Another one to the same reader.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn try_clone(&self) -> std::io::Result<EndReporter> {
        Ok(EndReporter {
            reports: self.reports.clone(),
            wake: self.wake.try_clone()?,
        })
    }

    /// Reports. Nobody listening means that the machine is being taken down already.
    pub fn report(&self, ended: ExitedVcpu) {
        if self.reports.send(ended).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// The buses as a vCPU sees them.
#[derive(Debug, Default)]
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// How often a vCPU that waits for room in the output buffer looks again.
const OUTPUT_RETRY: Duration = Duration::from_millis(2);
/// After a stop at least this long the guest is told that it was stopped, so that its watchdogs do not take it for a lockup.
/// Shorter ones are left alone: to be told resets the guest's watchdogs, which would then never see a real lockup.
const TELL_GUEST_AFTER: Duration = Duration::from_secs(1);
/// How many exits in a row the completion of one I/O instruction may take. String instructions take several; none this many.
const COMPLETION_LIMIT: u32 = 1 << 16;

/// What the vCPU thread does next.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused { since: Instant },
    ExitedVcpu,
    Quit,
}

/// What came of one `KVM_RUN`.
enum Ran {
    /// It was interrupted, or has nothing to say: look for commands.
    Interrupted,
    /// An I/O exit was answered; the instruction completes with the next `KVM_RUN`.
    AnsweredIo,
    /// It is over.
    ExitedVcpu(ExitReason),
}

/// A vCPU, in the hands of its thread.
#[derive(Debug)]
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    exit: Arc<ImmediateExit>,
    buses: Arc<Buses>,
    output: Output,
    commands: Receiver<Command>,
    ends: EndReporter,
    /// An I/O exit was answered and the instruction has not completed.
    io_pending: bool,
}

impl Vcpu {
    /// Puts a vCPU together; it does not run yet.
    pub fn new(
        (index, fd, exit): (u32, VcpuFd, Arc<ImmediateExit>),
        buses: Arc<Buses>,
        output: Output,
        commands: Receiver<Command>,
        ends: EndReporter,
    ) -> Vcpu {
        Vcpu {
            index,
            fd,
            exit,
            buses,
            output,
            commands,
            ends,
            io_pending: false,
        }
    }

    /// The thread: starts paused, returns when told to quit or when nobody can tell it anything any more.
    pub fn run(mut self) {
        let mut state = State::Paused {
            since: Instant::now(),
        };
        while state != State::Quit {
            // Clear first, then look for commands: see `ImmediateExit`.
            self.exit.clear();
            if let Some(command) = self.next_command(&state) {
                state = self.obey(command, state);
            } else if state == State::Running && !self.output.is_full() {
                match self.enter() {
                    Ran::Interrupted => self.io_pending = false,
                    Ran::AnsweredIo => self.io_pending = true,
                    Ran::ExitedVcpu(end) => {
                        self.report(end);
                        state = State::ExitedVcpu;
                    }
                }
            }
        }
    }

    /// The next command: waited for when there is nothing else to do. `None`: there is none, go on.
    fn next_command(&self, state: &State) -> Option<Command> {
        match state {
            State::Running if self.output.is_full() => {
                match self.commands.recv_timeout(OUTPUT_RETRY) {
                    Ok(command) => Some(command),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => Some(Command::Quit),
                }
            }
            State::Running => match self.commands.try_recv() {
                Ok(command) => Some(command),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => Some(Command::Quit),
            },
            _ => Some(self.commands.recv().unwrap_or(Command::Quit)),
        }
    }

    fn obey(&mut self, command: Command, state: State) -> State {
        match (command, state) {
            (Command::Quit, _) => State::Quit,
            (Command::Pause(stopped), State::Running) => {
                let after = self.complete_io();
                self.answer(&stopped);
                after
            }
            (Command::Pause(stopped), state) => {
                self.answer(&stopped);
                state
            }
            (Command::Resume, State::Paused { since }) => {
                if since.elapsed() >= TELL_GUEST_AFTER {
                    // EINVAL only says that this vCPU's guest does not use kvmclock.
                    let _ = self.fd.kvmclock_ctrl();
                }
                State::Running
            }
            (Command::Resume, state) => state,
        }
    }

    fn answer(&self, stopped: &Sender<Stopped>) {
        let at = Instant::now();
        // Whoever asked may have given up waiting.
        let _ = stopped.send(Stopped {
            index: self.index,
            at,
            regs: self.registers(),
        });
    }

    fn registers(&self) -> Result<VcpuRegs, String> {
        if self.io_pending {
            return Err(format!(
                "vCPU {}: an I/O instruction does not complete",
                self.index
            ));
        }
        capture(&self.fd, self.index)
    }

    /// Lets a pending I/O instruction complete, so that the registers are those after it. KVM completes it at the next
    /// `KVM_RUN` (`arch/x86/kvm/x86.c: kvm_arch_vcpu_ioctl_run`, `complete_userspace_io`), which with `immediate_exit` does
    /// nothing else. An instruction with several parts (string I/O, MMIO across pages) gives an exit for each.
    fn complete_io(&mut self) -> State {
        let paused = State::Paused {
            since: Instant::now(),
        };
        if !self.io_pending {
            return paused;
        }
        self.exit.set();
        for _ in 0..COMPLETION_LIMIT {
            match self.enter() {
                Ran::Interrupted => {
                    self.io_pending = false;
                    return paused;
                }
                Ran::AnsweredIo => {}
                Ran::ExitedVcpu(end) => {
                    self.report(end);
                    return State::ExitedVcpu;
                }
            }
        }
        paused
    }

    fn report(&mut self, end: ExitReason) {
        self.io_pending = false;
        self.ends.report(ExitedVcpu {
            index: self.index,
            end,
            regs: capture(&self.fd, self.index),
        });
    }

    /// One `KVM_RUN` and the answer to its exit.
    fn enter(&mut self) -> Ran {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // EAGAIN: an application processor has got its INIT or SIPI.
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                return Ran::Interrupted;
            }
            Err(e) => return Ran::ExitedVcpu(ExitReason::RunFailed(e)),
        };
        let effect = match exit {
            VcpuExit::IoOut(port, data) => self.buses.pio.write(port.into(), data),
            VcpuExit::IoIn(port, data) => {
                self.buses.pio.read(port.into(), data);
                Effect::None
            }
            VcpuExit::MmioWrite(address, data) => self.buses.mmio.write(address, data),
            VcpuExit::MmioRead(address, data) => {
                self.buses.mmio.read(address, data);
                Effect::None
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => return Ran::Interrupted,
            VcpuExit::Shutdown => return Ran::ExitedVcpu(ExitReason::TripleFault),
            VcpuExit::FailEntry(reason, _) => {
                return Ran::ExitedVcpu(ExitReason::FailEntry(reason));
            }
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => Effect::PowerOff,
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Effect::Reset,
            VcpuExit::InternalError => {
                return Ran::ExitedVcpu(ExitReason::InternalError(internal_error(&mut self.fd)));
            }
            other => return Ran::ExitedVcpu(ExitReason::Unexpected(format!("{other:?}"))),
        };
        match effect {
            Effect::None => Ran::AnsweredIo,
            Effect::Reset => Ran::ExitedVcpu(ExitReason::Reset),
            Effect::PowerOff => Ran::ExitedVcpu(ExitReason::PowerOff),
        }
    }
}
