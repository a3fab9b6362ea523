//! The configuration of a guest as plain data, and the syntax of sizes.

use std::path::PathBuf;

/// The highest number of vCPUs of a guest.
pub const MAX_CPUS: u32 = 8;

/// The configuration of a guest, for [`run_vm`](crate::run_vm).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// The kernel: a bzImage with a 64-bit entry point (boot protocol 2.12 or later).
    pub kernel: PathBuf,
    /// The initrd, if there is one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, printable ASCII, passed on unchanged.
    pub cmdline: String,
    /// The number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// The size of the guest's RAM in bytes, a multiple of 4096.
    pub memory: u64,
}

/// A text that is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a size: write a whole number with K, M or G, for example 512M or 2GiB \
     (a bare number is MiB)"
)]
pub struct BadSize(String);

/// Parses a size as other VMMs write it, in bytes: `512M`, `1G`, `512MiB`; a bare number is MiB.
///
/// # Errors
/// [`BadSize`]: the text is not a size, or the size does not fit in 64 bits.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_owned());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = text.get(digits.len()..).unwrap_or_default();
    let unit: u64 = match suffix.to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1 << 20,
        "k" | "kb" | "kib" => 1 << 10,
        "g" | "gb" | "gib" => 1 << 30,
        _ => return Err(bad()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let count: u64 = digits.parse().map_err(|_| bad())?;
    count.checked_mul(unit).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("512", 512 << 20),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MiB", 512 << 20),
            ("1G", 1 << 30),
            ("2GiB", 2 << 30),
            ("2097152K", 2 << 30),
            ("0", 0),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn not_sizes() {
        for text in [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "12X",
            "1 G",
            "0x10",
            "99999999999G",
            "99999999999999999999",
        ] {
            assert_eq!(parse_size(text), Err(BadSize(text.to_owned())), "{text}");
        }
    }
}
