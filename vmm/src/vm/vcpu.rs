//! One vCPU and the thread that runs it: in the guest, paused on command, or exited.
//!
//! Only this thread touches its vCPU. This module knows the buses and the console's back-pressure;
//! it must not know other vCPUs.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use introspect::VcpuRegs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use crate::console::output::Output;
use crate::devices::{Buses, Effect};
use crate::vm::kvm_run::{ImmediateExit, internal_error};
use crate::vm::regs::{RegsError, capture};

/// A command to a vCPU thread.
#[derive(Debug)]
pub enum Command {
    /// Stop outside the guest with no I/O pending, and report that to this channel.
    Pause(Sender<Stopped>),
    /// Run the guest again.
    Resume,
    /// End the thread.
    Quit,
}

/// The answer to [`Command::Pause`]: the vCPU has stopped.
#[derive(Debug)]
pub struct Stopped {
    /// Index of the vCPU.
    pub index: u32,
    /// When it had left the guest.
    pub at: Instant,
    /// Its registers. They cannot change until it is resumed, so the answer carries them and saves
    /// a second round of wakeups.
    pub regs: Result<VcpuRegs, RegsError>,
}

/// Why a vCPU does not enter the guest any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// A fault while a double fault was delivered: a PC would reset.
    TripleFault,
    /// KVM met something that it cannot emulate, or found its own state inconsistent: the suberror
    /// and its data words, if KVM gave any.
    InternalError(Option<(u32, Vec<u64>)>),
    /// The processor refused to enter the guest, for this hardware reason.
    FailEntry(u64),
    /// `KVM_RUN` failed.
    RunFailed(kvm_ioctls::Error),
    /// A KVM exit that this machine does not handle, as kvm-ioctls prints it.
    Unexpected(String),
    /// The vCPU's thread panicked.
    Panicked,
}

/// The report of a vCPU that has exited, which ends the machine.
#[derive(Debug)]
pub struct ExitedVcpu {
    /// Index of the vCPU.
    pub index: u32,
    /// Why it exited.
    pub reason: ExitReason,
    /// Its registers at the exit.
    pub regs: Result<VcpuRegs, RegsError>,
}

/// Where vCPU threads report that their vCPU has exited.
#[derive(Debug)]
pub struct ExitReporter {
    /// Takes the report.
    pub reports: Sender<ExitedVcpu>,
    /// Written to after each report, to wake the receiver.
    pub event: EventFd,
}

impl ExitReporter {
    /// Another reporter to the same receiver.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn try_clone(&self) -> std::io::Result<ExitReporter> {
        Ok(ExitReporter {
            reports: self.reports.clone(),
            event: self.event.try_clone()?,
        })
    }

    /// Reports `exited`. If the receiver is gone, the machine is being taken down already.
    pub fn report(&self, exited: ExitedVcpu) {
        if self.reports.send(exited).is_ok() {
            let _ = self.event.write(1);
        }
    }
}

/// How often a vCPU that waits for free space in the output buffer checks it.
const OUTPUT_RETRY: Duration = Duration::from_millis(2);
/// When a vCPU was held outside the guest for at least this long, the guest is notified
/// (`KVM_KVMCLOCK_CTRL`), so that its watchdogs do not take that for a lockup. It is not notified
/// of shorter times: a notification resets the guest's watchdogs, which would then never detect a
/// real lockup.
const NOTIFY_GUEST_AFTER: Duration = Duration::from_secs(1);
/// How many exits in a row the completion of one I/O instruction may take. String instructions take
/// several; none takes this many.
const MAX_COMPLETION_EXITS: u32 = 1 << 16;

/// What the vCPU thread does.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Exited,
    Quit,
}

/// The result of one `KVM_RUN`.
enum RunResult {
    /// It was interrupted, or the exit needs no answer: check for commands.
    Interrupted,
    /// An I/O exit was answered; the instruction completes in the next `KVM_RUN`.
    AnsweredIo,
    /// The vCPU does not enter the guest any more.
    Exited(ExitReason),
}

/// A vCPU, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    exit: Arc<ImmediateExit>,
    buses: Arc<Buses>,
    output: Output,
    commands: Receiver<Command>,
    exits: ExitReporter,
    /// An I/O exit was answered and the instruction has not completed.
    io_pending: bool,
    /// When the vCPU was last known to be in the guest. `None`: it has not run yet.
    left_guest: Option<Instant>,
    /// `KVM_RUN` was interrupted, and `left_guest` is when it was called. A command explains the
    /// interruption: the vCPU was in the guest until then. Without a command the whole process was
    /// stopped (SIGSTOP) and continued, and it is unknown when.
    interrupted: bool,
}

impl Vcpu {
    /// A vCPU that does not run yet; [`run`](Self::run) is its thread.
    pub fn new(
        (index, fd, exit): (u32, VcpuFd, Arc<ImmediateExit>),
        buses: Arc<Buses>,
        output: Output,
        commands: Receiver<Command>,
        exits: ExitReporter,
    ) -> Vcpu {
        Vcpu {
            index,
            fd,
            exit,
            buses,
            output,
            commands,
            exits,
            io_pending: false,
            left_guest: None,
            interrupted: false,
        }
    }

    /// The body of the thread. It starts paused, and returns on [`Command::Quit`] or when no sender
    /// of commands is left.
    pub fn run(mut self) {
        let mut state = State::Paused;
        while state != State::Quit {
            // Clear first, then check for commands: see `ImmediateExit`.
            self.exit.clear();
            if let Some(command) = self.next_command(&state) {
                state = self.execute(command, state);
            } else if state == State::Running && !self.output.is_full() {
                self.notify_guest_if_held();
                let entered = Instant::now();
                let result = self.enter();
                self.interrupted = matches!(result, RunResult::Interrupted);
                self.left_guest = Some(if self.interrupted {
                    entered
                } else {
                    Instant::now()
                });
                match result {
                    RunResult::Interrupted => self.io_pending = false,
                    RunResult::AnsweredIo => self.io_pending = true,
                    RunResult::Exited(reason) => {
                        self.report(reason);
                        state = State::Exited;
                    }
                }
            }
        }
    }

    /// The next command. Waits for one when there is nothing else to do; `None`: there is none,
    /// and the guest can run.
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

    /// Notifies the guest when this vCPU was held outside of it for long, for whichever reason: a
    /// pause, a console that is not read, a device that answered late, or the host.
    fn notify_guest_if_held(&self) {
        if self
            .left_guest
            .is_some_and(|left| left.elapsed() >= NOTIFY_GUEST_AFTER)
        {
            // EINVAL only means that this vCPU does not use kvmclock.
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    fn execute(&mut self, command: Command, state: State) -> State {
        match (command, state) {
            (Command::Quit, _) => State::Quit,
            (Command::Pause(stopped), State::Running) => {
                if std::mem::take(&mut self.interrupted) {
                    self.left_guest = Some(Instant::now());
                }
                let state = self.complete_io();
                self.answer(&stopped);
                state
            }
            (Command::Pause(stopped), state) => {
                self.answer(&stopped);
                state
            }
            (Command::Resume, State::Paused) => State::Running,
            (Command::Resume, state) => state,
        }
    }

    fn answer(&self, stopped: &Sender<Stopped>) {
        let at = Instant::now();
        // The receiver may have given up waiting.
        let _ = stopped.send(Stopped {
            index: self.index,
            at,
            regs: self.registers(),
        });
    }

    fn registers(&self) -> Result<VcpuRegs, RegsError> {
        if self.io_pending {
            return Err(RegsError::IoPending(self.index));
        }
        capture(&self.fd, self.index)
    }

    /// Lets a pending I/O instruction complete, so that the registers are those after it. KVM
    /// completes it in the next `KVM_RUN` (`arch/x86/kvm/x86.c: kvm_arch_vcpu_ioctl_run`,
    /// `complete_userspace_io`), which does nothing else when `immediate_exit` is set. An
    /// instruction with several parts (string I/O, MMIO across pages) causes an exit for each part.
    fn complete_io(&mut self) -> State {
        if !self.io_pending {
            return State::Paused;
        }
        self.exit.set();
        for _ in 0..MAX_COMPLETION_EXITS {
            match self.enter() {
                RunResult::Interrupted => {
                    self.io_pending = false;
                    return State::Paused;
                }
                RunResult::AnsweredIo => {}
                RunResult::Exited(reason) => {
                    self.report(reason);
                    return State::Exited;
                }
            }
        }
        State::Paused
    }

    fn report(&mut self, reason: ExitReason) {
        self.io_pending = false;
        self.exits.report(ExitedVcpu {
            index: self.index,
            reason,
            regs: capture(&self.fd, self.index),
        });
    }

    /// Does one `KVM_RUN` and answers its exit.
    fn enter(&mut self) -> RunResult {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // EAGAIN: an application processor has received its INIT or SIPI.
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                return RunResult::Interrupted;
            }
            Err(e) => return RunResult::Exited(ExitReason::RunFailed(e)),
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
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {
                return RunResult::Interrupted;
            }
            VcpuExit::Shutdown => return RunResult::Exited(ExitReason::TripleFault),
            VcpuExit::FailEntry(reason, _) => {
                return RunResult::Exited(ExitReason::FailEntry(reason));
            }
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => Effect::PowerOff,
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Effect::Reset,
            VcpuExit::InternalError => {
                return RunResult::Exited(ExitReason::InternalError(internal_error(&mut self.fd)));
            }
            other => return RunResult::Exited(ExitReason::Unexpected(format!("{other:?}"))),
        };
        match effect {
            Effect::None => RunResult::AnsweredIo,
            Effect::Reset => RunResult::Exited(ExitReason::Reset),
            Effect::PowerOff => RunResult::Exited(ExitReason::PowerOff),
        }
    }
}
