//! Builds livepatch modules for tests: those of `guests/patches` and the kernel's own sample, by
//! Kbuild against the headers of exactly the kernel that they are for.
//!
//! The modules are the files that `insmod` in a guest takes. They are not modified, except where a
//! test needs an invalid file ([`with_vermagic`]).

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::cache::{At, Cache, CacheError, fingerprint};
use crate::host::error::ToolError;
use crate::host::progress;
use crate::host::tools;
use crate::kernel::Kernel;
use crate::kernel::headers::{Headers, HeadersError};
use crate::kernel::sources::{SourceError, kernel_source};

/// The name of the patch made from the kernel's own sample.
pub const SAMPLE: &str = "livepatch-sample";
/// The sample's path in the kernel's source tree.
const SAMPLE_SOURCE: &str = "samples/livepatch/livepatch-sample.c";

/// Why a patch could not be built.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The kernel's headers could not be prepared.
    #[error(transparent)]
    Headers(#[from] HeadersError),
    /// The sample's source could not be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// `make` or `gcc` is missing on this host.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// There is no patch of this name.
    #[error("no patch {name}: there are {known}")]
    Unknown {
        /// The name that was requested.
        name: String,
        /// The names of all patches, separated by commas.
        known: String,
    },
    /// The build failed.
    #[error("patches for {release} do not build: {output}")]
    Build {
        /// The kernel's release.
        release: String,
        /// The last lines that `make` printed on standard error.
        output: String,
    },
    /// A module file is not as expected.
    #[error("{path}: {what}", path = .path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

macro_rules! patch_sources {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../patches/", $name, ".c")))),*]
    };
}

/// The patches of `guests/patches`: name and source.
const TEST_PATCHES: [(&str, &str); 26] = patch_sources![
    "callbacks",
    "cmdline",
    "constant",
    "exit-work",
    "faults",
    "features",
    "getpid",
    "init-value",
    "module-object",
    "dies-with-lock",
    "not-livepatch",
    "obstacles",
    "pause",
    "kinds",
    "kprobe-at",
    "kthread",
    "percpu",
    "rcu-callback",
    "replacing",
    "timer",
    "two-functions",
    "uname",
    "unknown-function",
    "unknown-symbol",
    "worker",
    "wrong-sympos",
];

/// The header for patches for a kernel without `CONFIG_LIVEPATCH`.
const KLP_PUBLIC_HEADER: &str = include_str!("../../patches/klp_public.h");

/// The names of all patches, including the kernel's sample.
pub fn names() -> impl Iterator<Item = &'static str> {
    TEST_PATCHES.iter().map(|(name, _)| *name).chain([SAMPLE])
}

/// The kernel that patches are built for.
#[derive(Clone, Copy)]
struct BuildTarget<'a> {
    /// The release, as `uname -r` prints it.
    release: &'a str,
    /// Distinguishes kernels of the same release.
    version: &'a str,
}

/// Builds the `.ko` of a patch for a kernel, or finds it in the cache. All patches of
/// `guests/patches` are built at once.
pub fn build(cache: &Cache, kernel: &Kernel, name: &str) -> Result<PathBuf, PatchError> {
    let target = BuildTarget {
        release: &kernel.release,
        version: &kernel.version,
    };
    let sources = if name == SAMPLE {
        let source = kernel_source(cache, kernel.generation, SAMPLE_SOURCE)?;
        let text = fs::read_to_string(&source).at(&source)?;
        vec![(SAMPLE, text)]
    } else {
        test_patches(name)?
    };
    let headers = || Ok(Headers::fetch(cache, kernel)?);
    let folder = build_all(cache, target, headers, &sources)?;
    Ok(folder.join(format!("{name}.ko")))
}

/// Like [`build`], for a kernel that is in no package: it has this release, and `version`
/// distinguishes its builds. The kernel's own sample is not available.
pub fn build_against(
    cache: &Cache,
    (release, version): (&str, &str),
    headers: &Headers,
    name: &str,
) -> Result<PathBuf, PatchError> {
    let target = BuildTarget { release, version };
    let folder = build_all(cache, target, || Ok(headers.clone()), &test_patches(name)?)?;
    Ok(folder.join(format!("{name}.ko")))
}

/// All patches of `guests/patches`, if `name` is one of them.
fn test_patches(name: &str) -> Result<Vec<(&'static str, String)>, PatchError> {
    if TEST_PATCHES.iter().any(|(n, _)| *n == name) {
        return Ok(TEST_PATCHES
            .iter()
            .map(|(n, t)| (*n, (*t).to_owned()))
            .collect());
    }
    Err(PatchError::Unknown {
        name: name.to_owned(),
        known: names().collect::<Vec<_>>().join(", "),
    })
}

fn build_all(
    cache: &Cache,
    target: BuildTarget<'_>,
    headers: impl FnOnce() -> Result<Headers, PatchError>,
    sources: &[(&str, String)],
) -> Result<PathBuf, PatchError> {
    let texts = sources
        .iter()
        .flat_map(|(n, t)| [n.as_bytes(), t.as_bytes()]);
    let others = [target.version.as_bytes(), KLP_PUBLIC_HEADER.as_bytes()];
    let hash = fingerprint(texts.chain(others));
    let cache = &cache.for_make()?;
    let place = cache.root().join("patches").join(target.release).join(hash);
    if place.is_dir() {
        return Ok(place);
    }
    tools::require(&[("make", "make"), ("gcc", "gcc")])?;
    let headers = headers()?;
    let _lock = cache.lock("patches")?;
    if place.is_dir() {
        return Ok(place);
    }
    let staging = cache.stage()?;
    let work = staging.path().join("work");
    fs::create_dir(&work).at(&work)?;
    let header = work.join("klp_public.h");
    fs::write(&header, KLP_PUBLIC_HEADER).at(&header)?;
    let mut makefile = format!(
        "ifndef CONFIG_LIVEPATCH\nccflags-y += -include {}\nendif\n",
        header.display()
    );
    for (name, text) in sources {
        let source = work.join(format!("{name}.c"));
        fs::write(&source, text).at(&source)?;
        makefile.push_str(&format!("obj-m += {name}.o\n"));
    }
    fs::write(work.join("Makefile"), makefile).at(&work)?;
    make(target.release, &headers, &work)?;
    let result = staging.path().join("result");
    fs::create_dir(&result).at(&result)?;
    for (name, _) in sources {
        let file = format!("{name}.ko");
        fs::rename(work.join(&file), result.join(&file)).at(&work.join(&file))?;
    }
    staging.publish(&result, &place)?;
    Ok(place)
}

fn make(release: &str, headers: &Headers, work: &Path) -> Result<(), PatchError> {
    let bar = progress::spinner(&format!("building patches for {release}"));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = tools::builder("make", work, headers.compiler.as_deref());
    command
        .arg(format!("-j{jobs}"))
        .arg("-C")
        .arg(&headers.folder)
        .arg(format!("M={}", work.display()))
        // One of the patches calls a function that does not exist: loading it must be refused.
        .arg("KBUILD_MODPOST_WARN=1")
        // No BTF of the module's own types, which is not needed to load it: a host has no pahole,
        // or one that does not know the options that this kernel's scripts give it.
        .arg("CONFIG_DEBUG_INFO_BTF_MODULES=")
        .arg("PAHOLE=false")
        .arg("modules");
    if !headers.libraries.is_empty() {
        command.env("LD_LIBRARY_PATH", &headers.libraries);
    }
    let output = command.output().at(Path::new("make"))?;
    bar.finish_and_clear();
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = stderr.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = lines
        .get(lines.len().saturating_sub(12)..)
        .unwrap_or_default();
    Err(PatchError::Build {
        release: release.to_owned(),
        output: last.join("; "),
    })
}

/// Writes a copy of a module whose vermagic names another kernel, for tests of what must be
/// refused.
pub fn with_vermagic(module: &Path, to: &Path) -> Result<(), PatchError> {
    const KEY: &[u8] = b"vermagic=";
    let mut bytes = fs::read(module).at(module)?;
    let digit = bytes
        .windows(KEY.len())
        .position(|w| w == KEY)
        .and_then(|at| bytes.get_mut(at + KEY.len()))
        .ok_or_else(|| PatchError::Module {
            path: module.to_owned(),
            what: "has no vermagic",
        })?;
    *digit = if *digit == b'9' { b'8' } else { b'9' };
    fs::write(to, bytes).at(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_version_of_a_vermagic_is_changed() {
        let folder = std::env::temp_dir().join(format!("outpatch-vermagic-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (good, bad) = (folder.join("good.ko"), folder.join("bad.ko"));
        fs::write(&good, b"license=GPL\0vermagic=6.1.0-1 SMP \0").unwrap();
        with_vermagic(&good, &bad).unwrap();
        assert_eq!(
            fs::read(&bad).unwrap(),
            b"license=GPL\0vermagic=9.1.0-1 SMP \0"
        );
        fs::write(&good, b"license=GPL\0").unwrap();
        let error = with_vermagic(&good, &bad).unwrap_err().to_string();
        assert!(error.ends_with("has no vermagic"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn each_patch_states_its_license() {
        for (name, text) in TEST_PATCHES {
            assert!(
                text.starts_with("// SPDX-License-Identifier: GPL-2.0"),
                "{name}"
            );
        }
    }
}
