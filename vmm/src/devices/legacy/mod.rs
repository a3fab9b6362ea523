//! The PC's devices that a stock kernel expects at fixed ports: COM1, the CMOS clock, the keyboard
//! controller's reset, and the ACPI power registers.

pub mod cmos;
pub mod i8042;
pub mod power;
pub mod serial;
pub mod transmitter;
