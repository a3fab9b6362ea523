//! All the firmware that a guest sees: the instructions at the PC's reset vector.
//!
//! A guest that finds hardware-reduced ACPI and no EFI restarts, as its last resort or as its first choice
//! (`arch/x86/kernel/reboot.c: reboot_init`, `machine_real_restart`), by going to real mode and jumping to where a BIOS
//! starts. Nothing there would leave a vCPU running through garbage for ever.

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use crate::devices::legacy::power;
use crate::layout;

/// `mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt`
const fn reset() -> [u8; 7] {
    let [low, high] = (power::PORT + power::RESET).to_le_bytes();
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4]
}

/// Writes what is executed at `F000:FFF0`: it resets the machine.
///
/// # Errors
/// When there is no memory.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&reset(), layout::RESET_VECTOR)
}
