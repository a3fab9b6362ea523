//! Devices of the PC that a stock kernel looks for at fixed ports.

pub mod cmos;
pub mod i8042;
pub mod power;
pub mod serial;
