//! The ACPI registers with which a guest switches a hardware-reduced machine off or resets it:
//! sleep control, sleep status and reset.

use crate::devices::{Device, Effect};

/// First of the three ports; the FADT lists them.
pub const PORT: u16 = 0x600;
/// Number of ports.
pub const PORTS: u64 = 3;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// The value that resets the machine; the FADT gives it to the guest.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that the DSDT's `\_S5` gives for soft-off.
pub const S5_TYPE: u8 = 5;

/// ACPI 6.5, 4.8.3.7: the bit that starts the transition.
const SLP_EN: u8 = 1 << 5;
/// ACPI 6.5, 4.8.3.7: the position of the sleep type.
const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 7;

/// The power registers, which hold no state.
#[derive(Debug, Default)]
pub struct Power;

impl Device for Power {
    /// Reads 0: there is no wake event to report.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else {
            return Effect::None;
        };
        if offset == u64::from(SLEEP_CONTROL)
            && value & SLP_EN != 0
            && (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == S5_TYPE
        {
            Effect::PowerOff
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            Effect::Reset
        } else {
            Effect::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_with_enable_switches_off() {
        let mut power = Power;
        let s5 = S5_TYPE << SLP_TYP_SHIFT;
        assert_eq!(power.write(0, &[s5]), Effect::None);
        assert_eq!(power.write(0, &[SLP_EN]), Effect::None);
        assert_eq!(power.write(1, &[s5 | SLP_EN]), Effect::None);
        assert_eq!(power.write(0, &[s5 | SLP_EN]), Effect::PowerOff);
        assert_eq!(power.write(2, &[0]), Effect::None);
        assert_eq!(power.write(2, &[RESET_VALUE]), Effect::Reset);
        assert_eq!(power.write(0, &[]), Effect::None);
    }
}
