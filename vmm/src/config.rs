//! What a guest is to be made of, as plain data, and how its sizes are written.

use std::path::PathBuf;

/// How many vCPUs a guest may have.
pub const MAX_CPUS: u32 = 8;

/// What a guest is to be made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// The kernel: a bzImage with a 64-bit entry.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as it is.
    pub cmdline: String,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
}

/// A size that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a size: write a whole number with K, M or G, for example 512M or 2GiB (a bare number is MiB)"
)]
pub struct BadSize(String);

/// Reads a size as users of other VMMs write it: `512M`, `1G`, `512MiB`; a bare number is MiB.
///
/// # Errors
/// [`BadSize`] when it is no such number or does not fit 64 bits.
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
