//! The ACPI registers of a hardware-reduced machine that switch it off and reset it: sleep control, sleep status, reset.

use crate::devices::{Device, Effect};

/// First of the three ports; the FADT names them.
pub const PORT: u16 = 0x600;
/// Number of ports.
pub const PORTS: u64 = 3;
/// Sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Reset register.
pub const RESET: u16 = 2;
/// What the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that the DSDT's `\_S5` gives for soft-off.
pub const S5_TYPE: u8 = 5;

/// ACPI 6.5, 4.8.3.7: the bit that starts the transition.
const SLP_EN: u8 = 1 << 5;
/// ACPI 6.5, 4.8.3.7: where the sleep type lies.
const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 7;

/// The registers themselves hold nothing.
#[derive(Debug, Default)]
pub struct Power;

impl Device for Power {
    /// Zero: no wake event to report.
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
