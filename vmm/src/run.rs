//! A guest from start to end: built, started, its console served, and taken down in order whichever way it ends.

use std::cell::RefCell;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::acpi;
use crate::boot::bzimage::Kernel;
use crate::boot::reset_vector;
use crate::boot::vcpu_state;
use crate::config::{MAX_CPUS, VmConfig};
use crate::console::output::Output;
use crate::console::stdin::Stdin;
use crate::console::terminal::RawTerminal;
use crate::devices::Bus;
use crate::devices::legacy::cmos::{self, Cmos};
use crate::devices::legacy::i8042::{self, I8042};
use crate::devices::legacy::power::{self, Power};
use crate::devices::legacy::serial::{self, Com1};
use crate::error::RunError;
use crate::signals;
use crate::vm::handle::VmHandle;
use crate::vm::shared::{Shared, VmState};
use crate::vm::vcpu::{Buses, EndReporter, ExitReason, ExitedVcpu};
use crate::vm::vcpu_set::Vcpus;
use crate::vm::{Vm, check_serving, open_kvm};

/// How long the last output may take to be written when the user or a signal wants us gone. When the guest ended by itself
/// we wait for as long as it takes: its last words are often the reason.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a guest ended that did not die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset; a guest is not started again.
    Reset,
    /// The user (Ctrl-A x) or the control socket ended it.
    Stopped,
    /// This signal ended it.
    Signal(i32),
}

/// Runs a guest on our standard input and output until it ends.
///
/// `with` is called when the machine is built and before its first vCPU runs; what it returns is kept until the guest has
/// ended, and dropped then.
///
/// # Errors
/// [`RunError`]: the guest could not be started, or ended because a vCPU cannot go on.
pub fn run<G, E>(
    config: &VmConfig,
    with: impl FnOnce(&VmHandle) -> Result<G, E>,
) -> Result<ExitKind, RunError>
where
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let cpus = u8::try_from(config.cpus)
        .ok()
        .filter(|cpus| (1..=MAX_CPUS).contains(&u32::from(*cpus)))
        .ok_or(RunError::Cpus(config.cpus))?;
    let mut kernel = Kernel::open(&config.kernel)?;
    let kvm = open_kvm()?;
    check_serving()?;
    let (vm, vcpus) = Vm::new(&kvm, config.memory, cpus)?;
    let ram = vm.memory().ram();
    let rsdp = acpi::write_tables(ram, cpus)?;
    reset_vector::write(ram)?;
    let entry = kernel.load(ram, config.initrd.as_deref(), &config.cmdline, rsdp)?;
    vcpu_state::write_boot_tables(ram)?;
    for (vcpu, _) in &vcpus {
        vcpu_state::set_msrs(vcpu)?;
    }
    if let Some((boot_vcpu, _)) = vcpus.first() {
        vcpu_state::set_boot_state(boot_vcpu, entry)?;
    }

    let (output, _writer) =
        Output::to(duplicate(io::stdout())?).map_err(|e| RunError::Host("console thread", e))?;
    let taken = eventfd()?;
    let irq = vm.irq_line(serial::GSI)?;
    let com1 = Arc::new(Mutex::new(Com1::new(irq, output.clone(), clone(&taken)?)));
    let buses = Arc::new(buses(com1.clone()));
    let (reports, ended) = channel();
    let wake = eventfd()?;
    let ends = EndReporter {
        reports,
        wake: clone(&wake)?,
    };
    let vcpus = Vcpus::start(vcpus, &buses, &output, &ends)
        .map_err(|e| RunError::Host("vCPU threads", e))?;
    let stop = eventfd()?;
    let shared = Arc::new(Shared {
        vcpus,
        vm,
        state: Mutex::new(VmState::Running),
        stop: clone(&stop)?,
    });
    let beside =
        with(&VmHandle::new(Arc::clone(&shared))).map_err(|e| RunError::Beside(e.into()))?;

    let signal = signals::catch().map_err(|e| RunError::Host("signals", e))?;
    let stdin = Stdin::new(duplicate(io::stdin())?, com1, taken, clone(&stop)?);
    let verdict = Rc::new(RefCell::new(None));
    let ends = ExitEvents {
        reports: ended,
        wake,
        stop,
        signal,
        verdict: Rc::clone(&verdict),
    };
    let terminal = RawTerminal::enter(io::stdin()).map_err(|e| RunError::Host("terminal", e))?;
    shared.vcpus.resume()?;
    let verdict = serve(stdin, ends, &verdict);
    shared.vcpus.end();
    drop(beside);
    let asked_to_go = matches!(
        verdict,
        Ok(RunOutcome::Exit(ExitKind::Stopped | ExitKind::Signal(_)))
    );
    let written = output.drain(asked_to_go.then(|| Instant::now() + LAST_WORDS));
    drop(terminal);
    if !written {
        tracing::warn!("standard output is not read: the guest's last output is lost");
    }
    match verdict? {
        RunOutcome::Exit(kind) => Ok(kind),
        RunOutcome::Died(ended) => Err(RunError::Died(ended)),
    }
}

fn buses(com1: Arc<Mutex<Com1<Output>>>) -> Buses {
    let pio = Bus::default()
        .with(serial::PORT.into(), serial::PORTS.into(), com1)
        .with(i8042::PORT, i8042::PORTS, Arc::new(Mutex::new(I8042)))
        .with(
            cmos::PORT.into(),
            cmos::PORTS,
            Arc::new(Mutex::new(Cmos::default())),
        )
        .with(
            power::PORT.into(),
            power::PORTS,
            Arc::new(Mutex::new(Power)),
        );
    Buses {
        pio,
        mmio: Bus::default(),
    }
}

fn eventfd() -> Result<EventFd, RunError> {
    EventFd::new(libc::EFD_NONBLOCK).map_err(|e| RunError::Host("eventfd", e))
}

fn clone(event: &EventFd) -> Result<EventFd, RunError> {
    event.try_clone().map_err(|e| RunError::Host("eventfd", e))
}

fn duplicate(stream: impl AsFd) -> Result<std::os::fd::OwnedFd, RunError> {
    stream
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| RunError::Host("standard input or output", e))
}

/// How it ended.
#[derive(Debug)]
enum RunOutcome {
    Exit(ExitKind),
    Died(Box<ExitedVcpu>),
}

/// The event loop, until there is a verdict.
fn serve(
    stdin: Stdin<Output>,
    ends: ExitEvents,
    verdict: &RefCell<Option<RunOutcome>>,
) -> Result<RunOutcome, RunError> {
    let mut events =
        EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(RunError::EventLoop)?;
    events.add_subscriber(Box::new(ends));
    events.add_subscriber(Box::new(stdin));
    loop {
        events.run().map_err(RunError::EventLoop)?;
        if let Some(verdict) = verdict.borrow_mut().take() {
            return Ok(verdict);
        }
    }
}

/// All that ends a guest, on the event loop. The first to come decides.
#[derive(Debug)]
struct ExitEvents {
    reports: Receiver<ExitedVcpu>,
    wake: EventFd,
    stop: EventFd,
    signal: EventFd,
    verdict: Rc<RefCell<Option<RunOutcome>>>,
}

impl MutEventSubscriber for ExitEvents {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [&self.wake, &self.stop, &self.signal] {
            if let Err(e) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!("event loop: {e:?}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let verdict = if events.fd() == self.wake.as_raw_fd() {
            let _ = self.wake.read();
            self.reports.try_recv().ok().map(|ended| match ended.end {
                ExitReason::PowerOff => RunOutcome::Exit(ExitKind::PowerOff),
                ExitReason::Reset => RunOutcome::Exit(ExitKind::Reset),
                _ => RunOutcome::Died(Box::new(ended)),
            })
        } else if events.fd() == self.stop.as_raw_fd() {
            let _ = self.stop.read();
            Some(RunOutcome::Exit(ExitKind::Stopped))
        } else {
            let _ = self.signal.read();
            Some(RunOutcome::Exit(ExitKind::Signal(signals::last())))
        };
        let mut first = self.verdict.borrow_mut();
        if first.is_none() {
            *first = verdict;
        }
    }
}
