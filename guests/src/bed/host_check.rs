//! What the host must have so that a bed can run on it, checked before anything is downloaded or
//! built. This module must not know what is fetched.

use std::path::Path;

use rustix::fs::{StatVfsMountFlags, statvfs};

use crate::bed::error::BedError;
use crate::host::cache::{At, Cache};
use crate::host::tools;

/// The programs and files of the host that are used besides the compiler, each with its Debian
/// package.
const TOOLS: [(&str, &str); 7] = [
    ("make", "make"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("tar", "tar"),
    ("setpriv", "util-linux"),
    ("perl", "perl"),
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
];

/// Makes sure of the host's programs, and that what is kept in the cache can be executed.
pub(super) fn check(cache: &Cache) -> Result<(), BedError> {
    tools::require(&[&tools::COMPILER[..], &TOOLS[..]].concat())?;
    for folder in [cache.root(), cache.for_make()?.root()] {
        let about = statvfs(folder).map_err(std::io::Error::from).at(folder)?;
        check_flags(folder, about.f_flag)?;
    }
    Ok(())
}

fn check_flags(folder: &Path, flags: StatVfsMountFlags) -> Result<(), BedError> {
    if !flags.contains(StatVfsMountFlags::NOEXEC) {
        return Ok(());
    }
    Err(BedError::Setup(format!(
        "{} is on a file system that is mounted noexec, and programs are run from there; \
         run `export OUTPATCH_CACHE=FOLDER` with a folder on another one",
        folder.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_is_mounted_noexec_is_named_with_what_to_do() {
        let check = |flags| check_flags(Path::new("/a/cache"), flags);
        check(StatVfsMountFlags::NOSUID).unwrap();
        let flags = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NOEXEC;
        let error = check(flags).unwrap_err().to_string();
        for part in ["/a/cache", "noexec", "OUTPATCH_CACHE"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
