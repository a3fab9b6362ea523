//! The transmitter of COM1 as its driver sees it: when it is empty, and its interrupt.
//!
//! Each byte is printed at once, so there is nothing that this could lose. But a transmitter that
//! is always empty makes a driver's interrupt handler go on for as long as there is more to print:
//! 16 bytes for each time that the transmitter is empty (`drivers/tty/serial/8250/8250_port.c:
//! serial8250_tx_chars`, `8250_core.c: serial8250_interrupt`). Then the interrupt is pending again:
//! a guest that prints much does nothing else on that CPU, until its watchdogs report a lockup. So
//! after what a handler writes in one go the transmitter takes its time, as a real one does.
//!
//! Only for a driver that has the interrupt enabled. One that polls (`wait_for_xmitr`: the kernel's
//! own messages) has disabled it, finds the transmitter always empty, and loses no time.
//!
//! This module knows the time and the interrupt; it must not know what is printed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// How long the transmitter takes at least. With 16 bytes for each interrupt that is 160 KB a
/// second; a real UART at 115,200 baud takes 14 times as long.
const MIN_REST: Duration = Duration::from_micros(100);
/// How long it takes at most, for bytes between which the host did not run the vCPU.
const MAX_REST: Duration = Duration::from_millis(10);
/// How often it is checked whether more can be printed, when the output is not read.
const RETRY: Duration = Duration::from_millis(10);

/// When the bytes were written that keep the transmitter busy.
#[derive(Clone, Copy, Debug)]
struct Load {
    first: Instant,
    last: Instant,
}

impl Load {
    /// When the transmitter is empty again: after as long as the guest needed for writing, so that
    /// its handler takes half of a CPU's time at most, on however slow a host.
    fn end(&self) -> Instant {
        let writing = self.last.duration_since(self.first);
        self.last + writing.clamp(MIN_REST, MAX_REST)
    }
}

/// A transmitter that raises an edge-triggered interrupt.
#[derive(Debug)]
pub struct Transmitter {
    irq: EventFd,
    /// The driver has enabled the interrupt.
    enabled: bool,
    /// The transmitter has become empty, and the driver has neither been told nor written since.
    pending: bool,
    /// `None`: it is empty.
    load: Option<Load>,
    timer: TimerFd,
}

impl Transmitter {
    /// An empty transmitter with its interrupt disabled.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(irq: EventFd) -> io::Result<Transmitter> {
        Ok(Transmitter {
            irq,
            enabled: false,
            pending: false,
            load: None,
            timer: TimerFd::new()?,
        })
    }

    /// Readable when [`check`](Self::check) is due. It must not be read.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether the driver has enabled the interrupt.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether the driver finds the transmitter empty.
    pub fn is_empty(&self) -> bool {
        self.load.is_none() || !self.enabled
    }

    /// Whether the empty transmitter is a reason for an interrupt.
    pub fn has_interrupt(&self) -> bool {
        self.enabled && self.pending
    }

    /// The driver has read the reason for the interrupt, and this was it.
    pub fn acknowledge(&mut self) {
        self.pending = false;
    }

    /// The driver enables or disables the interrupt. An empty transmitter interrupts when that is
    /// enabled.
    pub fn enable(&mut self, enabled: bool) {
        let was_enabled = std::mem::replace(&mut self.enabled, enabled);
        if enabled && self.load.is_none() && !(was_enabled && self.pending) {
            self.interrupt();
        }
    }

    /// A byte was written.
    pub fn written(&mut self) {
        if !self.enabled {
            return;
        }
        self.pending = false;
        let now = Instant::now();
        match &mut self.load {
            Some(load) => load.last = now,
            None => {
                let load = Load {
                    first: now,
                    last: now,
                };
                self.load = Some(load);
                self.check_in(MIN_REST);
            }
        }
    }

    /// Becomes empty when it is time. Not while the output has no room for more: as a receiver that
    /// uses flow control does, this lets a guest wait that prints too much, and its other work go
    /// on.
    pub fn check(&mut self, output_has_room: bool) {
        let left = self
            .load
            .map(|load| load.end().saturating_duration_since(Instant::now()));
        match left {
            Some(_) if !output_has_room => self.check_in(RETRY),
            Some(left) if !left.is_zero() => self.check_in(left),
            _ => self.become_empty(),
        }
    }

    fn become_empty(&mut self) {
        if let Err(e) = self.timer.clear() {
            tracing::warn!("COM1: {e}");
        }
        if self.load.take().is_some() && self.enabled {
            self.interrupt();
        }
    }

    fn check_in(&mut self, time: Duration) {
        if let Err(e) = self.timer.reset(time, None) {
            tracing::warn!("COM1 has no timer: {e}");
            self.load = None;
            self.interrupt();
        }
    }

    fn interrupt(&mut self) {
        self.pending = true;
        if let Err(e) = self.irq.write(1) {
            tracing::warn!("COM1: {e}");
        }
    }
}
