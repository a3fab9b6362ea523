//! Extracts single files from the kernel's source, which Debian ships as one large compressed
//! archive.
//!
//! The archive is read as a stream up to the file and then deleted: only the file is kept in the
//! cache.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use crate::debian::error::PackageError;
use crate::debian::packages::Packages;
use crate::host::cache::{At, Cache, CacheError};
use crate::host::progress;
use crate::kernel::Generation;

/// Why a source file could not be extracted.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source package could not be fetched.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The cache folder or the archive could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The archive does not have the file.
    #[error("no {file} in {archive}", archive = .archive.display())]
    NotFound {
        /// The file's path in the kernel's tree.
        file: String,
        /// The archive's path.
        archive: PathBuf,
    },
}

/// The size in bytes of the largest file that is extracted.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// Extracts the file whose path in the kernel's source tree is `file`, or finds it in the cache.
pub fn kernel_source(
    cache: &Cache,
    generation: Generation,
    file: &str,
) -> Result<PathBuf, SourceError> {
    let place = cache.root().join(format!("sources/{generation}/{file}"));
    if place.is_file() {
        return Ok(place);
    }
    let name = format!("linux-source-{generation}");
    let package = Packages::new(cache).fetch(&name, generation.suites())?;
    let archive = package.root.join(format!("usr/src/{name}.tar.xz"));
    let bar = progress::spinner(&format!("extracting {file} from {name}"));
    let packed = File::open(&archive).at(&archive)?;
    let plain = liblzma::read::XzDecoder::new(BufReader::new(packed));
    let found = find_in_tar(plain, file).at(&archive)?;
    bar.finish_and_clear();
    let content = found.ok_or_else(|| SourceError::NotFound {
        file: file.to_owned(),
        archive: archive.clone(),
    })?;
    cache.write(&place, &content)?;
    fs::remove_dir_all(&package.root).at(&package.root)?;
    Ok(place)
}

/// The content of the member whose path, without its first folder, is `file`, in a tar archive in
/// the POSIX ustar format.
fn find_in_tar(mut tar: impl Read, file: &str) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 512];
    loop {
        tar.read_exact(&mut header)?;
        if header.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let size = octal(&header[124..136])?;
        let path = format!("{}/{}", text(&header[345..500]), text(&header[..100]));
        let path = path.trim_start_matches('/');
        let matches = path.split_once('/').is_some_and(|(_, rest)| rest == file);
        if matches && size <= MAX_FILE_SIZE {
            let mut content = Vec::new();
            tar.take(size).read_to_end(&mut content)?;
            return Ok(Some(content));
        }
        let padded = size.next_multiple_of(512);
        let skipped = io::copy(&mut tar.by_ref().take(padded), &mut io::sink())?;
        if skipped != padded {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

fn octal(field: &[u8]) -> io::Result<u64> {
    let digits = text(field);
    u64::from_str_radix(digits.trim(), 8).map_err(|_| {
        io::Error::other(format!(
            "not a tar archive: the size of a member is {digits:?}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, content: &[u8]) -> Vec<u8> {
        let mut block = vec![0; 512];
        block[..path.len()].copy_from_slice(path.as_bytes());
        let size = format!("{:011o}", content.len());
        block[124..135].copy_from_slice(size.as_bytes());
        block.extend_from_slice(content);
        block.resize(block.len().next_multiple_of(512), 0);
        block
    }

    #[test]
    fn a_member_is_found_by_its_path_below_the_first_folder() {
        let mut tar = member("linux-1/a/other.c", &[b'x'; 700]);
        tar.extend(member("linux-1/a/this.c", b"int x;\n"));
        tar.extend([0; 1024]);
        let found = find_in_tar(tar.as_slice(), "a/this.c").unwrap();
        assert_eq!(found.as_deref(), Some(b"int x;\n".as_slice()));
        assert_eq!(find_in_tar(tar.as_slice(), "this.c").unwrap(), None);
        assert!(find_in_tar(&tar[..800], "a/this.c").is_err());
        assert!(find_in_tar([b'z'; 512].as_slice(), "a").is_err());
    }
}
