//! COM1: vm-superio's UART, and what that leaves to its user: a queue of input that waits until the
//! guest can take it.

use std::collections::VecDeque;
use std::io::{self, Write};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{Device, Effect};

/// First port.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// The interrupt line.
pub const GSI: u32 = 4;

/// The interrupt identification register, its value for no interrupt, and its bit for received
/// data.
const IIR: u8 = 2;
const IIR_NONE: u8 = 1;
const IIR_RECEIVED_DATA: u8 = 4;
/// The line status register, and its bit for received data.
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1;
/// The bit of the interrupt enable register for received data.
const IER_RECEIVED_DATA: u8 = 1;

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
    /// Input that did not fit in the UART's FIFO, or that came before the guest enabled reception.
    waiting: VecDeque<u8>,
    /// Written to when `waiting` has become empty.
    taken: EventFd,
}

impl<W: Write> Com1<W> {
    /// A UART that prints to `out`, raises `irq`, and writes to `taken` when the guest has taken
    /// all its input.
    pub fn new(irq: EventFd, out: W, taken: EventFd) -> Com1<W> {
        Com1 {
            uart: Serial::new(IrqLine(irq), out),
            waiting: VecDeque::new(),
            taken,
        }
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

    /// The reason for the interrupt. vm-superio withdraws received data as the reason when the
    /// first byte is read, a real UART when the last byte is read. A driver that stops after some
    /// number of bytes and reads the reason again (`8250_port.c: serial8250_rx_chars`, at 256)
    /// would never read the rest.
    fn identify(&mut self) -> u8 {
        let identity = self.uart.read(IIR);
        // The cheap check comes first: `state()` copies, and most interrupts are for output.
        let has_data = self.uart.read(LSR) & LSR_DATA_READY != 0;
        if has_data && self.uart.state().interrupt_enable & IER_RECEIVED_DATA != 0 {
            identity & !IIR_NONE | IIR_RECEIVED_DATA
        } else {
            identity
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
            *byte = match offset {
                IIR => self.identify(),
                _ => self.uart.read(offset),
            };
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
            if let Err(e) = self.uart.write(offset, byte) {
                tracing::warn!("COM1: {e}");
            }
        }
        if !self.waiting.is_empty() {
            self.feed();
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LSR: u64 = 5;

    fn com1() -> (Com1<Vec<u8>>, EventFd, EventFd) {
        let fd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (irq, taken) = (fd(), fd());
        (
            Com1::new(
                irq.try_clone().unwrap(),
                Vec::new(),
                taken.try_clone().unwrap(),
            ),
            irq,
            taken,
        )
    }

    fn read(com1: &mut Com1<Vec<u8>>, offset: u64) -> u8 {
        let mut data = [0];
        com1.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn early_input_waits_for_the_driver_and_none_is_lost() {
        let (mut com1, irq, taken) = com1();
        let input: Vec<u8> = (0..200).collect();
        com1.send(&input);
        assert_eq!(read(&mut com1, LSR) & 1, 0, "nothing to read yet");
        read(&mut com1, DATA);
        assert_eq!(
            com1.waiting(),
            200,
            "the driver's clearing read takes nothing"
        );
        com1.write(IER, &[IER_RECEIVED_DATA]);
        assert_eq!(irq.read().unwrap(), 1);
        let mut got = Vec::new();
        while read(&mut com1, LSR) & 1 == 1 {
            got.push(read(&mut com1, DATA));
        }
        assert_eq!(got, input);
        assert_eq!(taken.read().unwrap(), 1);
    }

    /// As Linux does it (`8250_port.c: serial8250_handle_irq`): it reads the reason, and then the
    /// data, up to a number of bytes.
    #[test]
    fn a_driver_that_stops_and_reads_the_reason_again_gets_all() {
        for len in 250..=600_usize {
            let (mut com1, irq, _) = com1();
            com1.write(IER, &[IER_RECEIVED_DATA]);
            let input: Vec<u8> = (0..=u8::MAX).cycle().take(len).collect();
            com1.send(&input);
            let mut got = Vec::new();
            while irq.read().is_ok() {
                while read(&mut com1, IIR) & IIR_NONE == 0 {
                    for _ in 0..256 {
                        if read(&mut com1, LSR) & 1 == 0 {
                            break;
                        }
                        got.push(read(&mut com1, DATA));
                    }
                }
            }
            assert_eq!(got, input);
        }
    }

    #[test]
    fn a_string_write_prints_every_byte() {
        let (mut com1, _, _) = com1();
        com1.write(DATA, b"hello");
        assert_eq!(com1.uart.writer(), b"hello");
    }
}
