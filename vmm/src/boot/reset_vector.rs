//! The code at the PC's reset vector, which is all the firmware that a guest has.
//!
//! A guest with hardware-reduced ACPI and no EFI restarts, as its first or its last method
//! (`arch/x86/kernel/reboot.c: reboot_init`, `machine_real_restart`), by switching to real mode and
//! jumping to the entry point of the BIOS. Without code there, the vCPU would execute garbage and
//! never stop.

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use crate::devices::legacy::power;
use crate::layout;

/// `mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt`
const fn reset() -> [u8; 7] {
    let [low, high] = (power::PORT + power::RESET).to_le_bytes();
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4]
}

/// Writes code to `F000:FFF0` that resets the machine.
///
/// # Errors
/// When there is no guest memory at the reset vector.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&reset(), layout::RESET_VECTOR)
}
