//! Unpacks a compressed module, as the front end of `insmod` does (`kmod`; `.ko.gz`, `.ko.xz`,
//! `.ko.zst`). The format is told by the first bytes, not by the name.
//!
//! This module knows nothing of ELF. The file may be hostile: what it unpacks to is limited, and so
//! is the memory of the decoders.

use std::borrow::Cow;
use std::io::{self, Read};

use crate::module::error::ModuleError;

/// The most memory of an xz decoder, in bytes: `xz -9` needs 65 MiB.
const MAX_XZ_MEMORY: u64 = 128 << 20;

/// A format of compression, by its first bytes and its name.
const FORMATS: [(&[u8], Format); 3] = [
    (&[0x1f, 0x8b], Format::Gzip),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Format::Xz),
    (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
];

#[derive(Clone, Copy)]
enum Format {
    Gzip,
    Xz,
    Zstd,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Gzip => "gzip",
            Format::Xz => "xz",
            Format::Zstd => "zstd",
        }
    }
}

/// The bytes of a module, unpacked if they are compressed.
///
/// # Errors
/// [`ModuleError::Compression`] for a damaged file, [`ModuleError::TooLarge`] for one that unpacks
/// to more than `max` bytes.
pub(in crate::module) fn unpack(bytes: &[u8], max: usize) -> Result<Cow<'_, [u8]>, ModuleError> {
    let mut formats = FORMATS.iter();
    let Some((_, format)) = formats.find(|(magic, _)| bytes.starts_with(magic)) else {
        return Ok(Cow::Borrowed(bytes));
    };
    let unpacked = match format {
        Format::Gzip => read(flate2::read::MultiGzDecoder::new(bytes), max),
        Format::Xz => xz(bytes, max),
        Format::Zstd => zstd(bytes, max),
    };
    let unpacked = unpacked.map_err(|error| ModuleError::Compression {
        format: format.name(),
        why: error.to_string(),
    })?;
    if unpacked.len() > max {
        let len = unpacked.len();
        return Err(ModuleError::TooLarge { len, max });
    }
    Ok(Cow::Owned(unpacked))
}

/// Reads up to one byte more than `max`.
fn read(from: impl Read, max: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    from.take(limit).read_to_end(&mut out)?;
    Ok(out)
}

fn xz(bytes: &[u8], max: usize) -> io::Result<Vec<u8>> {
    let stream =
        liblzma::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY, liblzma::stream::CONCATENATED)?;
    read(liblzma::read::XzDecoder::new_stream(bytes, stream), max)
}

/// The frames one after another.
fn zstd(mut bytes: &[u8], max: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    while !bytes.is_empty() && out.len() <= max {
        let decoder = ruzstd::decoding::StreamingDecoder::new(&mut bytes);
        let decoder = decoder.map_err(|error| io::Error::other(error.to_string()))?;
        out.append(&mut read(decoder, max - out.len())?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const TEXT: &[u8] = b"text of a module, text of a module, text of a module";

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn xz_of(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_of(bytes: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(bytes, level)
    }

    type Encoder = fn(&[u8]) -> Vec<u8>;
    const ENCODERS: [Encoder; 3] = [gzip, xz_of, zstd_of];

    #[test]
    fn every_format_is_unpacked_in_several_parts_too() {
        for encode in ENCODERS {
            let mut packed = encode(TEXT);
            assert_eq!(*unpack(&packed, TEXT.len()).unwrap(), *TEXT);
            packed.extend(encode(b" and more"));
            let whole = [TEXT, b" and more"].concat();
            assert_eq!(*unpack(&packed, 100).unwrap(), *whole);
        }
        let plain = b"\x7fELF and so on";
        assert!(matches!(unpack(plain, 5), Ok(Cow::Borrowed(same)) if same == plain));
    }

    #[test]
    fn what_unpacks_to_too_much_or_is_damaged_is_refused() {
        for encode in ENCODERS {
            let packed = encode(&vec![0; 1 << 20]);
            let too_large = unpack(&packed, (1 << 20) - 1).unwrap_err();
            assert!(
                matches!(too_large, ModuleError::TooLarge { .. }),
                "{too_large}"
            );
            let cut = &packed[..packed.len() - packed.len() / 3];
            let damaged = unpack(cut, 1 << 20).unwrap_err();
            assert!(
                matches!(damaged, ModuleError::Compression { .. }),
                "{damaged}"
            );
        }
    }
}
