//! COM1: vm-superio's UART, and what that leaves to its user: a queue of input that waits until the
//! guest can take it, and a transmitter that takes its time ([`Transmitter`]).
//!
//! The UART inside never has the transmitter's interrupt enabled. The bits of that interrupt and of
//! the empty transmitter are the [`Transmitter`]'s, the rest of each register is the UART's.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::RawFd;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::legacy::transmitter::Transmitter;
use crate::devices::{Device, Effect};

/// First port.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// The interrupt line.
pub const GSI: u32 = 4;

/// The data register, and the interrupt enable register with its bits for received data and for an
/// empty transmitter. While the line control register's bit for it is set, both are the baud rate's
/// divisor.
const DATA: u8 = 0;
const IER: u8 = 1;
const IER_RECEIVED_DATA: u8 = 1;
const IER_TRANSMITTER_EMPTY: u8 = 2;
const LCR: u8 = 3;
const LCR_DIVISOR: u8 = 0x80;
/// The interrupt identification register: the mask of its reason, and the reasons, of which
/// received data goes first.
const IIR: u8 = 2;
const IIR_REASON: u8 = 0x0f;
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER_EMPTY: u8 = 2;
const IIR_RECEIVED_DATA: u8 = 4;
/// The modem control register's bit for loopback: what is written is received, not transmitted.
const MCR: u8 = 4;
const MCR_LOOPBACK: u8 = 0x10;
/// The line status register, and its bits for received data and for an empty transmitter.
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// The UART's interrupt line: an eventfd on whose writes KVM raises an edge-triggered interrupt.
#[derive(Debug)]
pub struct IrqLine(pub EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// COM1, printing to a `W`.
#[derive(Debug)]
pub struct Com1<W: Write> {
    uart: Serial<IrqLine, NoEvents, W>,
    transmitter: Transmitter,
    /// Input that did not fit in the UART's FIFO, or that came before the guest enabled reception.
    waiting: VecDeque<u8>,
    /// Written to when `waiting` has become empty.
    taken: EventFd,
}

impl<W: Write> Com1<W> {
    /// A UART that prints to `out`, raises `irq`, and writes to `taken` when the guest has taken
    /// all its input.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(irq: EventFd, out: W, taken: EventFd) -> io::Result<Com1<W>> {
        Ok(Com1 {
            transmitter: Transmitter::new(irq.try_clone()?)?,
            uart: Serial::new(IrqLine(irq), out),
            waiting: VecDeque::new(),
            taken,
        })
    }

    /// Readable when [`check_transmitter`](Self::check_transmitter) is due. It must not be read.
    pub fn transmitter_timer(&self) -> RawFd {
        self.transmitter.timer()
    }

    /// Lets the guest print on, if it is time and the output has room for more.
    pub fn check_transmitter(&mut self, output_has_room: bool) {
        self.transmitter.check(output_has_room);
    }

    /// Queues `bytes` for the guest, and moves as many to the FIFO as it takes now.
    pub fn send(&mut self, bytes: &[u8]) {
        self.waiting.extend(bytes);
        self.feed();
    }

    /// How many bytes of input are not in the FIFO yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn read_register(&mut self, offset: u8) -> u8 {
        let value = match offset {
            IIR => return self.identify(),
            _ => self.uart.read(offset),
        };
        match offset {
            IER if self.transmitter.is_enabled() && !self.has_divisor() => {
                value | IER_TRANSMITTER_EMPTY
            }
            LSR if !self.transmitter.is_empty() => value & !LSR_TRANSMITTER_EMPTY,
            _ => value,
        }
    }

    fn write_register(&mut self, offset: u8, byte: u8) {
        let is_divisor = offset <= IER && self.has_divisor();
        let for_uart = match offset {
            IER if !is_divisor => byte & !IER_TRANSMITTER_EMPTY,
            _ => byte,
        };
        if let Err(e) = self.uart.write(offset, for_uart) {
            tracing::warn!("COM1: {e}");
        }
        match offset {
            IER if !is_divisor => self.transmitter.enable(byte & IER_TRANSMITTER_EMPTY != 0),
            DATA if !is_divisor && self.uart.read(MCR) & MCR_LOOPBACK == 0 => {
                self.transmitter.written();
            }
            _ => {}
        }
    }

    fn has_divisor(&mut self) -> bool {
        self.uart.read(LCR) & LCR_DIVISOR != 0
    }

    /// The reason for the interrupt. vm-superio withdraws received data as the reason when the
    /// first byte is read, a real UART when the last byte is read. A driver that stops after some
    /// number of bytes and reads the reason again (`8250_port.c: serial8250_rx_chars`, at 256)
    /// would never read the rest.
    fn identify(&mut self) -> u8 {
        let fifo_bits = self.uart.read(IIR) & !IIR_REASON;
        // The cheap check comes first: `state()` copies, and most interrupts are for output.
        let has_data = self.uart.read(LSR) & LSR_DATA_READY != 0;
        if has_data && self.uart.state().interrupt_enable & IER_RECEIVED_DATA != 0 {
            fifo_bits | IIR_RECEIVED_DATA
        } else if self.transmitter.has_interrupt() {
            self.transmitter.acknowledge();
            fifo_bits | IIR_TRANSMITTER_EMPTY
        } else {
            fifo_bits | IIR_NONE
        }
    }

    /// Moves input into the FIFO, but only while the guest has reception enabled: when its driver
    /// starts, it discards what is in the FIFO (`drivers/tty/serial/8250/8250_port.c:
    /// serial8250_do_startup`), which would lose the beginning of piped input.
    fn feed(&mut self) {
        if self.waiting.is_empty() || self.uart.state().interrupt_enable & IER_RECEIVED_DATA == 0 {
            return;
        }
        let free = self.uart.fifo_capacity().min(self.waiting.len());
        let chunk: Vec<u8> = self.waiting.iter().take(free).copied().collect();
        // The UART takes nothing in loopback mode; what it does not take stays in the queue.
        if let Ok(count) = self.uart.enqueue_raw_bytes(&chunk) {
            self.waiting.drain(..count);
        }
        if self.waiting.is_empty()
            && let Err(e) = self.taken.write(1)
        {
            tracing::warn!("console input may stall: {e}");
        }
    }
}

impl<W: Write + Send> Device for Com1<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else {
            return data.fill(0xff);
        };
        for byte in data {
            *byte = self.read_register(offset);
        }
        if !self.waiting.is_empty() {
            self.feed();
        }
    }

    /// More than one byte comes from a string instruction on one register, not from an access to
    /// several registers: UARTs are byte devices.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Ok(offset) = u8::try_from(offset) else {
            return Effect::None;
        };
        for &byte in data {
            self.write_register(offset, byte);
        }
        if !self.waiting.is_empty() {
            self.feed();
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
