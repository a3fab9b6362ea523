//! What modules are built against: a kernel's headers and build tools, from packages that are never installed.
//!
//! Debian splits them over three packages that refer to each other by their installed places. Here they are put together in
//! one folder; all their links are relative, so only the one `Makefile` with absolute paths is written anew.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::debian::error::PackageError;
use crate::debian::packages::{Package, Packages};
use crate::debian::toolchain::{self, ForeignRuntime};
use crate::host::cache::{At, Cache, CacheError, link_tree};
use crate::host::tools;
use crate::kernel::Kernel;

/// The suite of the machines that have the compiler: where the build tools' libraries come from, if they lack any.
const HOST_SUITE: &str = "bookworm";

/// Where the packages expect to be.
const INSTALLED: &str = "/usr/src/";

/// Why there are no headers.
#[derive(Debug, thiserror::Error)]
pub enum HeadersError {
    /// A package could not be had, or a tool is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The packages are not made as expected.
    #[error("the headers of {release} have no {what}")]
    Layout {
        /// The kernel.
        release: String,
        /// What is missing.
        what: &'static str,
    },
    /// The kernel's compiler is not on this machine.
    #[error(
        "kernel {release} was compiled by {compiler}, which this machine does not have: modules for it cannot be built here"
    )]
    Compiler {
        /// The kernel.
        release: String,
        /// Its compiler.
        compiler: String,
    },
}

/// A kernel's headers, ready to build modules against.
#[derive(Debug, Clone)]
pub struct Headers {
    /// The folder for `make -C`.
    pub folder: PathBuf,
    /// `LD_LIBRARY_PATH` for what is in it.
    pub libraries: OsString,
    /// Where the kernel's compiler is, if it is none of this machine's.
    pub compiler: Option<PathBuf>,
}

impl Headers {
    /// The headers of exactly this kernel; and its compiler is there.
    pub fn fetch(cache: &Cache, kernel: &Kernel) -> Result<Headers, HeadersError> {
        let release = &kernel.release;
        let packages = Packages::new(cache);
        let suites = kernel.generation.suites();
        let mut parts = vec![packages.fetch(&format!("linux-headers-{release}"), suites)?];
        for name in other_parts(&parts) {
            parts.push(packages.fetch(&name, suites)?);
        }
        let place = cache.root().join("headers").join(release);
        let own = format!("usr/src/linux-headers-{release}");
        // A newer Debian's programs need its own libraries.
        let newer = kernel.generation.foreign_suite();
        if !place.is_dir() {
            assemble(cache, kernel, &parts, &own, &place)?;
        }
        let folder = place.join(&own);
        let compiler = compiler(&folder).ok_or_else(|| layout(kernel, "compiler"))?;
        if let Some(suite) = newer {
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

fn assemble(
    cache: &Cache,
    kernel: &Kernel,
    parts: &[Package],
    own: &str,
    place: &Path,
) -> Result<(), HeadersError> {
    let staging = cache.stage()?;
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
    // A new file: the old one is the package's own, linked here.
    fs::remove_file(&makefile).at(&makefile)?;
    let here = place.join("usr/src");
    let text = text.replace(INSTALLED, &format!("{}/", here.display()));
    fs::write(&makefile, text).at(&makefile)?;
    Ok(staging.commit(place)?)
}

/// The compiler that the headers name, as `gcc-12` in `CC = … $(CROSS_COMPILE)gcc-12`.
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
    fn the_compiler_is_read_from_the_kernels_variables() {
        let text = "override ARCH = x86\nCCACHE = ccache\nCC = $(if $(X),$(CCACHE)) $(CROSS_COMPILE)gcc-12\nifneq (a,b)\n";
        assert_eq!(compiler_in(text).as_deref(), Some("gcc-12"));
        assert_eq!(compiler_in("override ARCH = x86\n"), None);
    }
}
