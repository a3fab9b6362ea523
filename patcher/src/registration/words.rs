//! [`Words`]: the bytes of a kernel structure, written field by field.
//!
//! This module knows offsets and sizes, as BTF has them; it must not know which structure it is.

use introspect::Field;

use crate::error::{PatchError, unexpected};

/// The most bytes of a structure: far more than any that is written has.
const MAX_SIZE: u64 = 64 << 10;

/// The bytes of one structure; all zeroes at first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    bytes: Vec<u8>,
}

impl Words {
    /// A structure of `size` bytes.
    ///
    /// # Errors
    /// [`PatchError`] for a size that no structure of a kernel has.
    pub fn new(size: u64) -> Result<Words, PatchError> {
        let len = usize::try_from(size).ok().filter(|_| size <= MAX_SIZE);
        let len = len.ok_or_else(|| unexpected(format!("a structure of {size} bytes")))?;
        Ok(Words {
            bytes: vec![0; len],
        })
    }

    /// Sets an integer or a pointer.
    ///
    /// # Errors
    /// [`PatchError`] if the structure has no such field, or the value does not fit it.
    pub fn set(&mut self, field: Field, value: u64) -> Result<(), PatchError> {
        let raw = value.to_le_bytes();
        let len = usize::try_from(field.size).unwrap_or(usize::MAX);
        match raw.split_at_checked(len) {
            Some((low, high)) if high.iter().all(|byte| *byte == 0) => self.set_bytes(field, low),
            _ => Err(unexpected(format!(
                "{value:#x} does not fit a field of {} bytes",
                field.size
            ))),
        }
    }

    /// Sets the first bytes of an array.
    ///
    /// # Errors
    /// [`PatchError`] if the structure has no such field, or there are more bytes than it has.
    pub fn set_bytes(&mut self, field: Field, value: &[u8]) -> Result<(), PatchError> {
        let fits = value.len() as u64 <= field.size;
        let start = usize::try_from(field.offset).ok().filter(|_| fits);
        let end = start.and_then(|start| start.checked_add(value.len()));
        let place = start
            .zip(end)
            .and_then(|(start, end)| self.bytes.get_mut(start..end));
        let place = place.ok_or_else(|| {
            unexpected(format!(
                "a structure has no {} bytes at offset {}",
                value.len(),
                field.offset
            ))
        })?;
        place.copy_from_slice(value);
        Ok(())
    }

    /// The bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_written_in_their_size() {
        let mut words = Words::new(12).unwrap();
        let field = |offset, size| Field { offset, size };
        words.set(field(0, 4), 0x0102_0304).unwrap();
        words.set(field(4, 1), 0xff).unwrap();
        words.set_bytes(field(6, 4), b"abc").unwrap();
        assert!(words.set(field(4, 1), 0x100).is_err());
        assert!(words.set(field(8, 8), 1).is_err());
        assert!(words.set(field(0, 16), 1).is_err());
        assert!(words.set_bytes(field(u64::MAX, 4), b"a").is_err());
        assert!(words.set_bytes(field(0, 2), b"abc").is_err());
        assert_eq!(words.into_bytes(), *b"\x04\x03\x02\x01\xff\0abc\0\0\0");
        assert!(Words::new(1 << 40).is_err());
    }
}
