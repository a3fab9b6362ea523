//! The part of the CMOS clock that a guest needs to read the time at boot, without waiting for an
//! update that never ends.
//!
//! The time is UTC, in BCD and 24-hour mode, as on PCs. There are no alarms and no interrupts.
//! Writes to the clock are ignored; the other bytes are RAM and keep what is written.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::devices::{Device, Effect};

/// The index port; the next port is the data port.
pub const PORT: u16 = 0x70;
/// Number of ports.
pub const PORTS: u64 = 2;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The century, where the IBM PC/AT and Linux's `mach_get_cmos_time` expect it when the FADT names
/// none.
const CENTURY: u8 = 0x32;
/// 32768 Hz time base, no update in progress.
const A_RUNNING: u8 = 0x26;
/// 24 hour mode, BCD.
const B_24_HOURS: u8 = 0x02;
/// Battery good.
const D_VALID: u8 = 0x80;
const SECONDS_PER_DAY: u64 = 86_400;

/// The CMOS clock and its RAM.
#[derive(Debug)]
pub struct Cmos {
    index: u8,
    ram: [u8; 128],
    /// Returns the seconds since 1970.
    now: fn() -> u64,
}

impl Default for Cmos {
    fn default() -> Self {
        Cmos::with_clock(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs())
        })
    }
}

impl Cmos {
    /// A clock that shows the time that `now` returns, in seconds since 1970.
    #[must_use]
    pub fn with_clock(now: fn() -> u64) -> Cmos {
        Cmos {
            index: 0,
            ram: [0; 128],
            now,
        }
    }

    fn register(&self) -> u8 {
        let time = Time::from_unix((self.now)());
        match self.index {
            0x00 => bcd(time.second),
            0x02 => bcd(time.minute),
            0x04 => bcd(time.hour),
            0x06 => bcd(time.weekday),
            0x07 => bcd(time.day),
            0x08 => bcd(time.month),
            0x09 => bcd(time.year % 100),
            CENTURY => bcd(time.year / 100),
            STATUS_A => A_RUNNING,
            STATUS_B => B_24_HOURS,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            other => self.ram.get(usize::from(other)).copied().unwrap_or(0),
        }
    }
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = if offset == 0 {
            self.index
        } else {
            self.register()
        };
        data.fill(value);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(&value) = data.first() {
            if offset == 0 {
                // Bit 7 masks NMIs on a PC and is no part of the index.
                self.index = value & 0x7f;
            } else if let Some(byte) = self.ram.get_mut(usize::from(self.index)) {
                *byte = value;
            }
        }
        Effect::None
    }
}

/// A date and time of day in UTC.
#[derive(Debug, PartialEq, Eq)]
struct Time {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    /// 1 is Sunday.
    weekday: u64,
}

impl Time {
    /// Converts days to a date by counting eras of 400 years that begin on 1 March, so that the
    /// leap day is the last day of its year.
    fn from_unix(seconds: u64) -> Time {
        let days = seconds / SECONDS_PER_DAY;
        let of_day = seconds % SECONDS_PER_DAY;
        let since_era = days + 719_468;
        let era = since_era / 146_097;
        let day_of_era = since_era % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        Time {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
            weekday: (days + 4) % 7 + 1,
        }
    }
}

/// The last two decimal digits of `value`, in BCD.
fn bcd(value: u64) -> u8 {
    let value = u8::try_from(value % 100).unwrap_or(0);
    ((value / 10) << 4) | (value % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &mut Cmos, index: u8) -> u8 {
        cmos.write(0, &[index | 0x80]);
        let mut data = [0];
        cmos.read(1, &mut data);
        data[0]
    }

    #[test]
    fn it_shows_the_time_in_bcd() {
        // 2024-02-29 23:59:58, a Thursday.
        let mut cmos = Cmos::with_clock(|| 1_709_251_198);
        let shown =
            [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY].map(|index| read(&mut cmos, index));
        assert_eq!(shown, [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20]);
    }

    #[test]
    fn dates_around_the_leap_days() {
        for (seconds, year, month, day) in [
            (0, 1970, 1, 1),
            (951_782_400, 2000, 2, 29),
            (951_868_800, 2000, 3, 1),
            (1_735_689_599, 2024, 12, 31),
            (4_107_542_400, 2100, 3, 1),
        ] {
            let time = Time::from_unix(seconds);
            assert_eq!(
                (time.year, time.month, time.day),
                (year, month, day),
                "{seconds}"
            );
        }
    }

    #[test]
    fn no_update_is_ever_in_progress_and_the_battery_is_good() {
        let mut cmos = Cmos::default();
        assert_eq!(read(&mut cmos, STATUS_A) & 0x80, 0);
        assert_eq!(read(&mut cmos, STATUS_D), D_VALID);
        cmos.write(0, &[0x0f]);
        cmos.write(1, &[0x0a]);
        assert_eq!(
            read(&mut cmos, 0x0f),
            0x0a,
            "the shutdown status byte is RAM"
        );
    }
}
