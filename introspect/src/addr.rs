//! Typed addresses: a guest virtual address is neither a guest physical address nor a number.
//!
//! Guest physical addresses are vm-memory's [`GuestAddress`](vm_memory::GuestAddress). Host
//! addresses never appear in this crate.

use std::fmt;

use serde::{Serialize, Serializer};

/// A guest virtual address (*gva*), as the guest kernel itself uses it.
///
/// Arithmetic wraps: kernel addresses are at the top of the address space, and the kernel's own
/// per-CPU arithmetic wraps too.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gva(pub u64);

impl Gva {
    /// The null pointer.
    pub const NULL: Gva = Gva(0);

    /// `self + bytes`, modulo 2^64.
    #[must_use]
    pub const fn add(self, bytes: u64) -> Gva {
        Gva(self.0.wrapping_add(bytes))
    }

    /// `self - bytes`, modulo 2^64.
    #[must_use]
    pub const fn sub(self, bytes: u64) -> Gva {
        Gva(self.0.wrapping_sub(bytes))
    }

    /// `self + bytes` for a signed displacement, modulo 2^64.
    #[must_use]
    pub const fn offset(self, bytes: i64) -> Gva {
        Gva(self.0.wrapping_add_signed(bytes))
    }

    /// The distance from `base` up to `self` in bytes, modulo 2^64.
    #[must_use]
    pub const fn since(self, base: Gva) -> u64 {
        self.0.wrapping_sub(base.0)
    }

    /// Whether this is the null pointer.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({self})")
    }
}

impl fmt::LowerHex for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// As a string: a JSON number cannot hold every 64-bit address.
impl Serialize for Gva {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A half-open range `[start, end)` of guest virtual addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GvaRange {
    /// The first address in the range.
    pub start: Gva,
    /// The first address after the range.
    pub end: Gva,
}

impl GvaRange {
    /// The range `[start, end)`; empty when `end` is not above `start`.
    #[must_use]
    pub const fn new(start: Gva, end: Gva) -> GvaRange {
        GvaRange { start, end }
    }

    /// Whether `gva` lies in the range.
    #[must_use]
    pub const fn contains(&self, gva: Gva) -> bool {
        self.start.0 <= gva.0 && gva.0 < self.end.0
    }

    /// The length in bytes; 0 for a range whose end is below its start.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether no address lies in the range.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
