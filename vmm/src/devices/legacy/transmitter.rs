//! The transmitter of COM1 as its driver sees it: when it is empty, and its interrupt.
//!
//! Each byte is printed at once, so there is nothing that this could lose. But a transmitter that
//! is always empty makes a driver's interrupt handler go on for as long as there is more to print:
//! 16 bytes for each time that the transmitter is empty (`drivers/tty/serial/8250/8250_port.c:
//! serial8250_tx_chars`, `8250_core.c: serial8250_interrupt`). Then the interrupt is pending again:
//! a guest that prints much does nothing else on that CPU, until its watchdogs report a lockup. So
//! after a burst of bytes the transmitter takes its time, as a real one does after its FIFO's.
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

/// How many bytes the transmitter takes before it is busy: a handler's turn. Each turn costs an
/// interrupt and the time until the host's timer expires, so that a much smaller one makes printing
/// slow.
const BURST: u32 = 256;
/// How long the transmitter is busy at least: 2.5 MB a second at most.
const MIN_REST: Duration = Duration::from_micros(100);
/// How long it is busy at most, for bytes between which the host did not run the vCPU.
const MAX_REST: Duration = Duration::from_millis(10);
/// How often it is checked whether more can be printed, when the output is not read.
const RETRY: Duration = Duration::from_millis(10);

/// The bytes that were written since the transmitter last had its time.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first: Instant,
    last: Instant,
    bytes: u32,
}

impl Burst {
    /// When the transmitter has had its time: after as long as the guest needed for writing, within
    /// limits, so that much of a CPU's time is left for other work.
    fn end(&self) -> Instant {
        let writing = self.last.duration_since(self.first);
        self.last + writing.clamp(MIN_REST, MAX_REST)
    }

    fn is_complete(&self) -> bool {
        self.bytes >= BURST
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
    /// `None`: it has had its time.
    burst: Option<Burst>,
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
            burst: None,
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
        !self.enabled || !self.is_busy()
    }

    fn is_busy(&self) -> bool {
        self.burst.is_some_and(|burst| burst.is_complete())
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
    /// enabled, but only when it has had its time: a driver that is given many short lines, and
    /// enables the interrupt for each, then prints several in one turn.
    pub fn enable(&mut self, enabled: bool) {
        let was_enabled = std::mem::replace(&mut self.enabled, enabled);
        if enabled && self.burst.is_none() && !(was_enabled && self.pending) {
            self.interrupt();
        }
    }

    /// A byte was written.
    ///
    /// Before the burst is complete, the transmitter is empty again at once. A handler sees that
    /// when it reads the reason again, which it does until there is none; so this raises no
    /// interrupt for each byte. Whoever writes elsewhere gets the interrupt of
    /// [`check`](Self::check).
    pub fn written(&mut self) {
        if !self.enabled {
            return;
        }
        let now = Instant::now();
        let first = self.burst.map_or(now, |burst| burst.first);
        let bytes = self.burst.map_or(0, |burst| burst.bytes).saturating_add(1);
        let is_new = self.burst.is_none();
        self.burst = Some(Burst {
            first,
            last: now,
            bytes,
        });
        self.pending = !self.is_busy();
        if is_new {
            self.check_in(MIN_REST);
        }
    }

    /// Becomes empty when it is time. Not while the output has no room for more: as a receiver that
    /// uses flow control does, this lets a guest wait that prints too much, and its other work go
    /// on.
    pub fn check(&mut self, output_has_room: bool) {
        let left = self
            .burst
            .map(|burst| burst.end().saturating_duration_since(Instant::now()));
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
        if self.burst.take().is_some() && self.enabled {
            self.interrupt();
        }
    }

    fn check_in(&mut self, time: Duration) {
        if let Err(e) = self.timer.reset(time, None) {
            tracing::warn!("COM1 has no timer: {e}");
            self.burst = None;
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
