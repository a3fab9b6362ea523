//! The reset command of the keyboard controller, the only part of it that a PC without a keyboard
//! needs.

use crate::devices::{Device, Effect};

/// First port: the data port.
pub const PORT: u64 = 0x60;
/// Number of ports, from data to command.
pub const PORTS: u64 = 5;
/// Offset of the command port.
const COMMAND: u64 = 4;
/// The command that pulses the processor's reset line.
pub const PULSE_RESET: u8 = 0xfe;

/// The keyboard controller's reset. The ports between data and command belong to other devices
/// (0x61 is the in-kernel PIT's).
#[derive(Debug, Default)]
pub struct I8042;

impl Device for I8042 {
    /// Reads 0: both buffers are empty. With all ones a guest would wait for the input buffer to
    /// become empty before it sends its reset command.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data.first()) {
            (COMMAND, Some(&PULSE_RESET)) => Effect::Reset,
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_on_the_command_port_resets() {
        let mut i8042 = I8042;
        assert_eq!(i8042.write(0, &[PULSE_RESET]), Effect::None);
        assert_eq!(i8042.write(COMMAND, &[0xd1]), Effect::None);
        assert_eq!(i8042.write(COMMAND, &[]), Effect::None);
        assert_eq!(i8042.write(COMMAND, &[PULSE_RESET]), Effect::Reset);
        let mut status = [0xff];
        i8042.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
