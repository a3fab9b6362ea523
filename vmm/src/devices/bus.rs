//! A bus: finds the device that answers at an address. The same type serves I/O ports and MMIO.

use std::sync::{Arc, Mutex, PoisonError};

/// The effect of a write on the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// No effect outside the device.
    None,
    /// The guest resets the machine.
    Reset,
    /// The guest switches the machine off.
    PowerOff,
}

/// A device that answers on a bus.
pub trait Device: Send {
    /// Reads at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// First address, number of addresses, and the device that answers there.
type Range = (u64, u64, Arc<Mutex<dyn Device>>);

/// Devices by address. As on a PC, an address without a device reads as all ones and ignores
/// writes.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|(base, len, _)| (base, len)))
            .finish()
    }
}

impl Bus {
    /// Adds `device` at `base..base + len`. Of overlapping devices the one added first answers.
    #[must_use]
    pub fn with(mut self, base: u64, len: u64, device: Arc<Mutex<dyn Device>>) -> Bus {
        self.ranges.push((base, len, device));
        self
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn Device>)> {
        self.ranges.iter().find_map(|(base, len, device)| {
            let offset = address.checked_sub(*base)?;
            (offset < *len).then_some((offset, &**device))
        })
    }

    /// Reads at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address) {
            Some((offset, device)) => device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data),
            None => Effect::None,
        }
    }
}

/// The two address spaces in which a vCPU reaches devices.
#[derive(Debug, Default)]
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped I/O, by guest-physical address.
    pub mmio: Bus,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, _data: &[u8]) -> Effect {
            self.0 = offset;
            Effect::Reset
        }
    }

    #[test]
    fn only_the_device_in_range_answers() {
        let echo = Arc::new(Mutex::new(Echo(0)));
        let bus = Bus::default().with(0x60, 5, echo.clone());
        let mut data = [0; 2];
        bus.read(0x64, &mut data);
        assert_eq!(data, [4, 4]);
        bus.read(0x65, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.read(0x5f, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        assert_eq!(bus.write(0x61, &[1]), Effect::Reset);
        assert_eq!(echo.lock().unwrap().0, 1);
        assert_eq!(bus.write(u64::MAX, &[1]), Effect::None);
    }
}
