//! Runs the compiler and build tools of a newer Debian on this host, with that Debian's own dynamic
//! loader and C library.
//!
//! Each program in the cache is renamed and replaced by a script that starts it with the loader.
//! Nothing of the host is changed, and nothing is installed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::debian::error::PackageError;
use crate::debian::packages::{Package, Packages};
use crate::host::cache::{At, Cache, CacheError, fingerprint, link_tree};
use crate::host::tools;

/// The folders of a package that can have libraries.
const LIBRARY_FOLDERS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// The dynamic loader's file, in one of these folders.
const LOADER: &str = "ld-linux-x86-64.so.2";
/// A limit on the library packages that are fetched; the programs need fewer.
const MAX_LIBRARIES: usize = 64;
/// Part of the cached toolchains' names: increase it when the scripts change.
const WRAPPER_VERSION: &[u8] = b"2";

/// The loader and libraries that run programs of another Debian.
#[derive(Debug, Clone)]
pub struct ForeignRuntime {
    loader: PathBuf,
    /// Folders, separated by colons.
    libraries: String,
}

impl ForeignRuntime {
    /// Fetches what the programs of `packages` need from `suite`.
    ///
    /// # Errors
    /// When a library cannot be fetched.
    pub fn fetch(
        cache: &Cache,
        suite: &'static str,
        packages: &[&Package],
    ) -> Result<ForeignRuntime, PackageError> {
        let archive = Packages::new(cache);
        let mut wanted: Vec<String> = packages.iter().flat_map(|p| libraries_of(p)).collect();
        let mut seen = BTreeSet::new();
        let mut folders = Vec::new();
        let mut loader = None;
        while let Some(name) = wanted.pop() {
            if seen.len() >= MAX_LIBRARIES || !seen.insert(name.clone()) {
                continue;
            }
            let library = archive.fetch(&name, &[suite])?;
            for folder in LIBRARY_FOLDERS.map(|below| library.root.join(below)) {
                let here = folder.join(LOADER);
                if here.exists() {
                    loader = Some(here);
                }
                if folder.is_dir() {
                    folders.push(folder.display().to_string());
                }
            }
            wanted.extend(libraries_of(&library));
        }
        let missing = || PackageError::Tool {
            command: format!("searching {LOADER} in {seen:?}"),
            stderr: "not found".to_owned(),
        };
        Ok(ForeignRuntime {
            loader: loader.ok_or_else(missing)?,
            libraries: folders.join(":"),
        })
    }

    /// Replaces every program below `tree` by a script that runs it.
    ///
    /// # Errors
    /// When the tree cannot be read or written.
    pub fn wrap(&self, tree: &Path) -> Result<(), CacheError> {
        let mut waiting = vec![tree.to_owned()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(&folder).at(&folder)?.flatten() {
                let (path, kind) = (entry.path(), entry.file_type().at(&entry.path())?);
                if kind.is_dir() {
                    waiting.push(path);
                } else if kind.is_file() && is_program(&path)? {
                    self.wrap_one(&path)?;
                }
            }
        }
        Ok(())
    }

    fn wrap_one(&self, program: &Path) -> Result<(), CacheError> {
        let mut renamed = program.as_os_str().to_owned();
        renamed.push(".real");
        let renamed = PathBuf::from(renamed);
        fs::rename(program, &renamed).at(program)?;
        let name = renamed
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // The script finds the program relative to itself, as the tree is moved once it is
        // complete.
        let script = format!(
            "#!/bin/sh\n\
             exec {} --library-path {} --argv0 \"$0\" \"$(dirname \"$0\")/{name}\" \"$@\"\n",
            tools::shell_word(&self.loader.display().to_string()),
            tools::shell_word(&self.libraries),
        );
        fs::write(program, script).at(program)?;
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).at(program)
    }
}

/// Fetches `compiler` (for example "gcc-14") from `suite`, ready to run on this host. Returns the
/// folder that has the program.
///
/// # Errors
/// When a package cannot be fetched, or the cache cannot be written.
pub fn fetch_compiler(
    cache: &Cache,
    suite: &'static str,
    compiler: &str,
) -> Result<PathBuf, PackageError> {
    let archive = Packages::new(cache);
    let number = compiler.trim_start_matches("gcc-");
    let driver = archive.fetch(&format!("{compiler}-x86-64-linux-gnu"), &[suite])?;
    let passes = archive.fetch(&format!("cpp-{number}-x86-64-linux-gnu"), &[suite])?;
    let headers = archive.fetch(&format!("libgcc-{number}-dev"), &[suite])?;
    let foreign = ForeignRuntime::fetch(cache, suite, &[&driver, &passes])?;
    let hash = fingerprint([
        WRAPPER_VERSION,
        driver.version.as_bytes(),
        passes.version.as_bytes(),
        foreign.libraries.as_bytes(),
    ]);
    let place = cache.root().join(format!("toolchains/{compiler}-{hash}"));
    if !place.is_dir() {
        let staging = cache.stage()?;
        for package in [&driver, &passes, &headers] {
            link_tree(&package.root, staging.path())?;
        }
        foreign.wrap(staging.path())?;
        let short = staging.path().join("usr/bin").join(compiler);
        if !short.exists() {
            symlink(format!("x86_64-linux-gnu-{compiler}"), &short).at(&short)?;
        }
        staging.commit(&place)?;
    }
    Ok(place.join("usr/bin"))
}

fn libraries_of(package: &Package) -> Vec<String> {
    let is_library =
        |name: &&str| (name.starts_with("lib") && !name.ends_with("-dev")) || *name == "zlib1g";
    package
        .needs()
        .filter(is_library)
        .map(str::to_owned)
        .collect()
}

/// Whether the file is an executable that names the dynamic loader: no script, library or object
/// file.
fn is_program(path: &Path) -> Result<bool, CacheError> {
    const MAGIC: &[u8] = b"\x7fELF";
    if fs::metadata(path).at(path)?.permissions().mode() & 0o111 == 0 {
        return Ok(false);
    }
    let bytes = fs::read(path).at(path)?;
    Ok(bytes.starts_with(MAGIC)
        && bytes
            .windows(LOADER.len())
            .take(8 << 10)
            .any(|name| name == LOADER.as_bytes()))
}
