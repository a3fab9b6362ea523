//! The headers and build tools that modules for a stock kernel are built with, in the cache.
//!
//! Debian splits them into three packages that refer to each other by their installed paths. Here
//! they are merged in one folder. All links in them are relative, so only the one `Makefile` with
//! absolute paths is rewritten.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::debian::error::PackageError;
use crate::debian::packages::{Package, Packages};
use crate::debian::toolchain::{self, ForeignRuntime};
use crate::host::cache::{At, Cache, CacheError, link_tree};
use crate::host::tools;
use crate::kernel::Kernel;

/// The suite of the libraries that the build tools need and the host lacks. It is the suite of the
/// hosts that have the compiler.
const HOST_SUITE: &str = "bookworm";

/// The path that the packages expect to be installed at.
const INSTALLED: &str = "/usr/src/";

/// Why the headers could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum HeadersError {
    /// A package could not be fetched, or a tool is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The packages lack an expected file or line.
    #[error("the headers of {release} have no {what}")]
    Layout {
        /// The kernel's release.
        release: String,
        /// What is missing.
        what: &'static str,
    },
    /// The kernel's compiler is not on this host.
    #[error(
        "kernel {release} was compiled by {compiler}, which this host does not have: \
         modules for it cannot be built here"
    )]
    Compiler {
        /// The kernel's release.
        release: String,
        /// The compiler's program, for example `gcc-12`.
        compiler: String,
    },
}

/// A kernel's headers and build tools, ready to build modules with.
#[derive(Debug, Clone)]
pub struct Headers {
    /// The folder for `make -C`.
    pub folder: PathBuf,
    /// The value of `LD_LIBRARY_PATH` for the build tools in it.
    pub libraries: OsString,
    /// The folder of the kernel's compiler, if it is not the host's own.
    pub compiler: Option<PathBuf>,
}

impl Headers {
    /// Fetches the headers of exactly this kernel, and makes sure of its compiler.
    pub fn fetch(cache: &Cache, kernel: &Kernel) -> Result<Headers, HeadersError> {
        let release = &kernel.release;
        let packages = Packages::new(cache);
        let suites = kernel.generation.suites();
        let mut parts = vec![packages.fetch(&format!("linux-headers-{release}"), suites)?];
        for name in other_parts(&parts) {
            parts.push(packages.fetch(&name, suites)?);
        }
        let place = cache.for_make()?.root().join("headers").join(release);
        let own = format!("usr/src/linux-headers-{release}");
        let foreign_suite = kernel.generation.foreign_suite();
        if !place.is_dir() {
            assemble(cache, kernel, &parts, &own, &place)?;
        }
        let folder = place.join(&own);
        let compiler = compiler(&folder).ok_or_else(|| layout(kernel, "compiler"))?;
        // A newer Debian's programs need its own libraries.
        if let Some(suite) = foreign_suite {
            return Ok(Headers {
                folder,
                libraries: OsString::new(),
                compiler: Some(toolchain::fetch_compiler(cache, suite, &compiler)?),
            });
        }
        if tools::find(&compiler).is_none() {
            return Err(HeadersError::Compiler {
                release: release.clone(),
                compiler,
            });
        }
        let parts: Vec<&Package> = parts.iter().collect();
        let libraries = packages.fetch_libraries(&parts, HOST_SUITE)?;
        Ok(Headers {
            folder,
            libraries,
            compiler: None,
        })
    }
}

/// The packages that the first one needs, and that are parts of the headers.
fn other_parts(first: &[Package]) -> Vec<String> {
    let needs = first.iter().flat_map(Package::needs);
    let parts = needs.filter(|d| d.starts_with("linux-headers-") || d.starts_with("linux-kbuild-"));
    parts.map(str::to_owned).collect()
}

fn layout(kernel: &Kernel, what: &'static str) -> HeadersError {
    HeadersError::Layout {
        release: kernel.release.clone(),
        what,
    }
}

/// Merges the packages in the folder `place`, which is in the part of the cache for make.
fn assemble(
    cache: &Cache,
    kernel: &Kernel,
    parts: &[Package],
    own: &str,
    place: &Path,
) -> Result<(), HeadersError> {
    let staging = cache.for_make()?.stage()?;
    for part in parts {
        link_tree(&part.root, staging.path())?;
    }
    if let Some(suite) = kernel.generation.foreign_suite() {
        let parts: Vec<&Package> = parts.iter().collect();
        ForeignRuntime::fetch(cache, suite, &parts)?.wrap(staging.path())?;
    }
    let makefile = staging.path().join(own).join("Makefile");
    let text = fs::read_to_string(&makefile).at(&makefile)?;
    if !text.contains(INSTALLED) {
        return Err(layout(kernel, "Makefile that names its common part"));
    }
    // The old file is a hard link to the package's own: it must not be changed.
    fs::remove_file(&makefile).at(&makefile)?;
    let here = place.join("usr/src");
    let text = text.replace(INSTALLED, &format!("{}/", here.display()));
    fs::write(&makefile, text).at(&makefile)?;
    Ok(staging.commit(place)?)
}

/// The compiler that the headers name: `gcc-12` from `CC = … $(CROSS_COMPILE)gcc-12`.
fn compiler(folder: &Path) -> Option<String> {
    let variables = fs::read_to_string(folder.join(".kernelvariables")).ok()?;
    compiler_in(&variables)
}

fn compiler_in(variables: &str) -> Option<String> {
    let line = variables
        .lines()
        .find(|l| l.trim_start_matches("override ").starts_with("CC "))?;
    let (_, last) = line.rsplit_once(')')?;
    Some(last.trim().to_owned()).filter(|c| c.starts_with("gcc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_is_found_in_the_kernels_variables() {
        let text = "override ARCH = x86\nCCACHE = ccache\n\
                    CC = $(if $(X),$(CCACHE)) $(CROSS_COMPILE)gcc-12\nifneq (a,b)\n";
        assert_eq!(compiler_in(text).as_deref(), Some("gcc-12"));
        assert_eq!(compiler_in("override ARCH = x86\n"), None);
    }
}
