//! COM1 as a driver finds it.

use std::time::{Duration, Instant};

use super::*;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

fn com1() -> (Com1<Vec<u8>>, EventFd, EventFd) {
    let fd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (irq, taken) = (fd(), fd());
    (
        Com1::new(
            irq.try_clone().unwrap(),
            Vec::new(),
            taken.try_clone().unwrap(),
        )
        .unwrap(),
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

/// What `serial8250_interrupt` does at one interrupt of a driver that always has more to print.
/// Returns how many bytes it has written when there is no more reason for the interrupt.
fn print_in_handler(com1: &mut Com1<Vec<u8>>) -> usize {
    let mut written = 0;
    for _ in 0..512 {
        if read(com1, IIR) & IIR_NONE != 0 {
            return written;
        }
        if read(com1, LSR) & 0x20 != 0 {
            for _ in 0..16 {
                com1.write(DATA, b"x");
                written += 1;
            }
        }
    }
    panic!("{written} bytes in one interrupt");
}

/// Waits until the transmitter is empty.
fn wait_until_empty(com1: &mut Com1<Vec<u8>>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while read(com1, LSR) & LSR_TRANSMITTER_EMPTY == 0 {
        assert!(Instant::now() < deadline, "it stays busy");
        com1.check_transmitter(true);
    }
}

#[test]
fn an_interrupt_is_for_sixteen_bytes_and_half_of_the_time_is_the_guests() {
    let (mut com1, irq, _) = com1();
    com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
    for round in 1..=100 {
        assert_eq!(irq.read().unwrap(), 1);
        let started = Instant::now();
        assert_eq!(print_in_handler(&mut com1), 16);
        let in_handler = started.elapsed();
        assert_eq!(com1.uart.writer().len(), round * 16, "printed at once");
        assert!(irq.read().is_err(), "no interrupt while it is busy");
        wait_until_empty(&mut com1);
        // The last read of the reason is not the transmitter's.
        assert!(started.elapsed() >= in_handler.max(Duration::from_micros(100)));
    }
}

#[test]
fn a_driver_that_polls_never_waits() {
    let (mut com1, irq, _) = com1();
    for enabled in [0, IER_TRANSMITTER_EMPTY] {
        // Also after another CPU has printed with interrupts.
        com1.write(IER, &[enabled]);
        print_in_handler(&mut com1);
        com1.write(IER, &[0]);
        for _ in 0..10_000 {
            assert_eq!(read(&mut com1, LSR) & 0x60, 0x60);
            com1.write(DATA, b"x");
        }
        let _ = irq.read();
    }
    // Interrupts start again where they were interrupted.
    com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
    wait_until_empty(&mut com1);
    assert_eq!(irq.read().unwrap(), 1);
    assert_eq!(read(&mut com1, IIR) & 0xf, IIR_TRANSMITTER_EMPTY);
}

/// As `8250_port.c: serial8250_do_startup` tests it, for bugs of other UARTs.
#[test]
fn an_empty_transmitter_interrupts_whenever_that_is_enabled() {
    let (mut com1, irq, _) = com1();
    for _ in 0..3 {
        com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(read(&mut com1, LSR) & 0x60, 0x60);
        assert_eq!(read(&mut com1, IIR) & 0xf, IIR_TRANSMITTER_EMPTY);
        assert_eq!(read(&mut com1, IIR) & 0xf, IIR_NONE, "read once");
        assert_eq!(read(&mut com1, IER), IER_TRANSMITTER_EMPTY);
        com1.write(IER, &[0]);
        assert_eq!(read(&mut com1, IIR) & 0xf, IIR_NONE);
        assert_eq!(read(&mut com1, IER), 0);
    }
}

#[test]
fn received_data_goes_first_and_the_empty_transmitter_is_not_forgotten() {
    let (mut com1, _, _) = com1();
    com1.write(IER, &[IER_RECEIVED_DATA | IER_TRANSMITTER_EMPTY]);
    com1.send(b"a");
    assert_eq!(read(&mut com1, IIR) & 0xf, IIR_RECEIVED_DATA);
    assert_eq!(read(&mut com1, DATA), b'a');
    assert_eq!(read(&mut com1, IIR) & 0xf, IIR_TRANSMITTER_EMPTY);
    assert_eq!(read(&mut com1, IIR) & 0xf, IIR_NONE);
}

#[test]
fn no_more_is_asked_for_while_the_output_has_no_room() {
    let (mut com1, irq, _) = com1();
    com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
    print_in_handler(&mut com1);
    let _ = irq.read();
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        com1.check_transmitter(false);
        assert_eq!(read(&mut com1, LSR) & LSR_TRANSMITTER_EMPTY, 0);
    }
    assert!(irq.read().is_err());
    wait_until_empty(&mut com1);
    assert_eq!(irq.read().unwrap(), 1);
}

#[test]
fn the_divisor_and_loopback_are_not_transmitted() {
    let (mut com1, irq, _) = com1();
    com1.write(LCR, &[LCR_DIVISOR]);
    com1.write(DATA, &[12]);
    com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
    assert_eq!(read(&mut com1, DATA), 12);
    assert_eq!(read(&mut com1, IER), IER_TRANSMITTER_EMPTY);
    com1.write(LCR, &[3]);
    assert_eq!(read(&mut com1, IER), 0);
    assert!(irq.read().is_err());
    com1.write(IER, &[IER_TRANSMITTER_EMPTY]);
    com1.write(MCR, &[MCR_LOOPBACK]);
    com1.write(DATA, b"x");
    assert_eq!(read(&mut com1, LSR) & 0x61, 0x61, "received, and empty");
    assert!(com1.uart.writer().is_empty());
}
