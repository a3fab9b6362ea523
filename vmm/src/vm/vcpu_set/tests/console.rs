//! Guests that print while they are paused, or while their output is not read.

use super::*;

/// Prints without end:
/// mov dx, 0x3f8 ; next: mov al, cl ; out dx, al ; inc cx ; jmp next
const PRINT: &[u8] = &[0xba, 0xf8, 0x03, 0x88, 0xc8, 0xee, 0x41, 0xeb, 0xfa];

#[test]
fn a_storm_of_pauses_loses_and_doubles_no_output() {
    let guest = Guest::new(PRINT, 1, 1);
    let mut console = guest.console.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        console.read_to_end(&mut all).unwrap();
        all
    });
    let vcpus = guest.resume();
    for round in 0..2000 {
        vcpus.pause().unwrap();
        let regs = vcpus.regs().unwrap();
        assert!(
            (CODE..=CODE + 7).contains(&regs[0].rip),
            "round {round}: rip {:#x}",
            regs[0].rip
        );
        vcpus.resume().unwrap();
    }
    vcpus.pause().unwrap();
    let printed = vcpus.regs().unwrap()[0].rcx;
    vcpus.end();
    assert!(guest.output.drain(Some(Instant::now() + SOON)));
    drop(guest);
    let all = reader.join().unwrap();
    let expected = (0..=255_u8).cycle().take(all.len());
    assert!(
        all.iter().copied().eq(expected),
        "a byte is lost or doubled"
    );
    let low = u16::try_from(all.len() % 0x1_0000).unwrap();
    let ahead = low.wrapping_sub(u16::try_from(printed & 0xffff).unwrap());
    assert!(ahead <= 1, "printed {printed:#x}, arrived {:#x}", all.len());
}

#[test]
fn a_guest_whose_output_is_not_read_can_be_paused_and_loses_nothing() {
    let guest = Guest::new(PRINT, 1, 1);
    let vcpus = guest.resume();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !guest.output.is_full() {
        assert!(Instant::now() < deadline, "the buffer never fills");
        thread::sleep(Duration::from_millis(1));
    }
    vcpus.pause().unwrap();
    let before = vcpus.regs().unwrap();
    vcpus.resume().unwrap();
    thread::sleep(Duration::from_millis(20));
    vcpus.pause().unwrap();
    assert_eq!(vcpus.regs().unwrap(), before, "it waits");
    vcpus.resume().unwrap();
    let mut first = vec![0; 100_000];
    let mut console = guest.console.try_clone().unwrap();
    console.read_exact(&mut first).unwrap();
    assert!(
        first
            .iter()
            .copied()
            .eq((0..=255_u8).cycle().take(first.len()))
    );
}

/// Each vCPU switches its kvmclock on, at 0x3000 + 0x40 * BX. Then vCPU 0 prints without end,
/// and the others count in the byte at 0x2000:
/// mov ecx, MSR_KVM_SYSTEM_TIME_NEW ; mov ax, bx ; shl ax, 6 ; or ax, 0x3001 ; xor edx, edx
/// wrmsr ; test bx, bx ; jnz count ; mov dx, 0x3f8 ; next: mov al, cl ; out dx, al ; inc cx
/// jmp next ; count: inc byte [0x2000] ; jmp count
const PRINT_WITH_CLOCK: &[u8] = &[
    0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, 0x89, 0xd8, 0xc1, 0xe0, 0x06, 0x0d, 0x01, 0x30, 0x66, 0x31,
    0xd2, 0x0f, 0x30, 0x85, 0xdb, 0x75, 0x09, 0xba, 0xf8, 0x03, 0x88, 0xc8, 0xee, 0x41, 0xeb, 0xfa,
    0xfe, 0x06, 0x00, 0x20, 0xeb, 0xfa,
];

#[test]
fn a_console_that_is_not_read_holds_all_vcpus_and_each_notifies_its_guest() {
    let guest = Guest::new(PRINT_WITH_CLOCK, 2, 2);
    // `pvclock_vcpu_time_info.flags`, PVCLOCK_GUEST_STOPPED.
    let notified = |vcpu: u64| guest.byte(0x3000 + 0x40 * vcpu + 29) & 2 != 0;
    let counts = || {
        let before = guest.byte(0x2000);
        thread::sleep(Duration::from_millis(50));
        guest.byte(0x2000) != before
    };
    guest.resume();
    let deadline = Instant::now() + SOON;
    while !guest.output.is_full() {
        assert!(Instant::now() < deadline, "the buffer never fills");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(counts(), "a short wait holds only the vCPU that prints");
    while counts() {
        assert!(Instant::now() < deadline, "the other vCPU is not held");
    }
    thread::sleep(Duration::from_millis(1500));
    assert_eq!((notified(0), notified(1)), (false, false));
    let mut console = guest.console.try_clone().unwrap();
    thread::spawn(move || std::io::copy(&mut console, &mut std::io::sink()));
    while !(notified(0) && notified(1) && counts()) {
        assert!(Instant::now() < deadline, "{} {}", notified(0), notified(1));
    }
}
