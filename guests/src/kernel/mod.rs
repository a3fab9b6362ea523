//! Fetches stock Debian kernels, as users run them: the newest of a generation and flavour.
//!
//! No point version is named here: the newest match is fetched, and the cache's index records which
//! version that was.

pub mod headers;
pub mod modules;
pub mod no_livepatch;
pub mod patches;
pub mod prepared;
pub mod sources;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::debian::error::PackageError;
use crate::debian::packages::{Package, Packages};
use crate::host::cache::Cache;

/// A generation of stock kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Generation {
    /// Debian 11's kernel.
    V5_10,
    /// Debian 12's kernel.
    V6_1,
    /// Debian 12's backported kernel (Debian 13 has the same one, built by another compiler).
    V6_12,
    /// The kernel of Debian's next release, as long as `sid` or `forky` have it.
    V7_2,
    /// Debian 13's backported kernel.
    V7_3,
}

/// What a kernel is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flavour {
    /// Virtual machines: few drivers, small packages.
    Cloud,
    /// Any machine.
    Generic,
    /// Any machine, with `CONFIG_PREEMPT_RT`.
    Rt,
}

/// Why a kernel could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A package could not be fetched.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The packages lack a file.
    #[error("no {what} in the packages of kernel {release}")]
    Part {
        /// What is missing.
        what: &'static str,
        /// The kernel's release, as `uname -r` prints it.
        release: String,
    },
    /// The text names no generation.
    #[error("no kernel generation {0:?}: choose 5.10, 6.1, 6.12, 7.2 or 7.3")]
    Generation(String),
}

/// A stock kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The generation that was requested.
    pub generation: Generation,
    /// The flavour that was requested.
    pub flavour: Flavour,
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// The package's Debian version.
    pub version: String,
    /// The path of the kernel image (bzImage).
    pub bzimage: PathBuf,
    /// The path of its build configuration.
    pub config: PathBuf,
    /// The folder of its modules.
    pub modules: PathBuf,
}

impl Generation {
    /// Every generation, oldest first.
    pub const ALL: [Generation; 5] = [
        Generation::V5_10,
        Generation::V6_1,
        Generation::V6_12,
        Generation::V7_2,
        Generation::V7_3,
    ];

    /// The kernel version, for example `6.12`.
    pub fn number(self) -> &'static str {
        match self {
            Generation::V5_10 => "5.10",
            Generation::V6_1 => "6.1",
            Generation::V6_12 => "6.12",
            Generation::V7_2 => "7.2",
            Generation::V7_3 => "7.3",
        }
    }

    /// The Debian suites that have its packages.
    pub fn suites(self) -> &'static [&'static str] {
        match self {
            Generation::V5_10 => &["bullseye-security", "bullseye"],
            Generation::V6_1 => &["bookworm-security", "bookworm"],
            Generation::V6_12 => &["bookworm-security", "bookworm-backports"],
            Generation::V7_2 => &["forky", "sid"],
            Generation::V7_3 => &["trixie-backports"],
        }
    }

    /// The suite that its kernels were built on, if that is newer than the hosts that tests run on:
    /// its compiler must be fetched.
    pub fn foreign_suite(self) -> Option<&'static str> {
        match self {
            Generation::V7_3 => Some("trixie"),
            // The host's assembler does not accept the output of 7.2's compiler.
            _ => None,
        }
    }

    /// The suites that have its kernels with debugging information.
    pub fn debug_suites(self) -> &'static [&'static str] {
        match self {
            // The security archive still lists Debian 11's, but no longer has the files.
            Generation::V5_10 => &["bullseye"],
            _ => self.suites(),
        }
    }
}

impl Flavour {
    /// Every flavour, the smallest first.
    pub const ALL: [Flavour; 3] = [Flavour::Cloud, Flavour::Generic, Flavour::Rt];

    /// The end of the packages' names, after the version.
    fn suffix(self) -> &'static str {
        match self {
            Flavour::Cloud => "-cloud-amd64",
            Flavour::Generic => "-amd64",
            Flavour::Rt => "-rt-amd64",
        }
    }

    /// Whether the package `name` is of this flavour. The longest matching suffix counts, as all
    /// suffixes end with the generic one.
    fn matches(self, name: &str) -> bool {
        let longest = Flavour::ALL
            .into_iter()
            .filter(|flavour| name.ends_with(flavour.suffix()))
            .max_by_key(|flavour| flavour.suffix().len());
        longest == Some(self)
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flavour::Cloud => "cloud",
            Flavour::Generic => "generic",
            Flavour::Rt => "rt",
        })
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.number())
    }
}

impl FromStr for Generation {
    type Err = KernelError;

    fn from_str(text: &str) -> Result<Generation, KernelError> {
        Generation::ALL
            .into_iter()
            .find(|g| g.number() == text)
            .ok_or_else(|| KernelError::Generation(text.to_owned()))
    }
}

impl Kernel {
    /// Fetches the newest kernel of a generation and flavour, or finds it in the cache.
    pub fn fetch(
        cache: &Cache,
        generation: Generation,
        flavour: Flavour,
    ) -> Result<Kernel, KernelError> {
        let packages = Packages::new(cache);
        let suites = generation.suites();
        let start = format!("linux-image-{generation}.");
        let wanted = |name: &str| flavour.matches(name);
        let image = packages.fetch_newest(&start, flavour.suffix(), wanted, suites)?;
        Kernel::of(&packages, (generation, flavour), image, suites)
    }

    /// Fetches the newest cloud kernel of a generation that has debugging information, and its
    /// `vmlinux`.
    pub fn fetch_debug(
        cache: &Cache,
        generation: Generation,
    ) -> Result<(Kernel, PathBuf), KernelError> {
        let suites = generation.debug_suites();
        let start = format!("linux-image-{generation}.");
        let symbols = Packages::new(cache).only("*/vmlinux*");
        let flavour = Flavour::Cloud;
        let symbols = symbols.fetch_newest_extra(&start, flavour.suffix(), "-dbg", suites)?;
        let name = symbols.name.trim_end_matches("-dbg");
        let packages = Packages::new(cache);
        let image = packages.fetch_version(name, &symbols.version, suites)?;
        let kernel = Kernel::of(&packages, (generation, flavour), image, suites)?;
        let release = &kernel.release;
        let vmlinux = symbols
            .root
            .join(format!("usr/lib/debug/boot/vmlinux-{release}"));
        if !vmlinux.is_file() {
            return Err(KernelError::Part {
                what: "vmlinux",
                release: release.clone(),
            });
        }
        Ok((kernel, vmlinux))
    }

    fn of(
        packages: &Packages,
        (generation, flavour): (Generation, Flavour),
        image: Package,
        suites: &[&str],
    ) -> Result<Kernel, KernelError> {
        let release = image
            .name
            .strip_prefix("linux-image-")
            .unwrap_or(&image.name)
            .to_owned();
        let version = image.version.clone();
        let names = part_names(&image, &release);
        let mut parts = vec![image];
        // From 7.x on, the image package is empty and depends on the packages of its parts.
        for name in names {
            parts.push(packages.fetch(&name, suites)?);
        }
        let find = |what: &'static str, places: [String; 3]| {
            first(&parts, &places).ok_or_else(|| KernelError::Part {
                what,
                release: release.clone(),
            })
        };
        let bzimage = find(
            "kernel image",
            [
                format!("boot/vmlinuz-{release}"),
                format!("usr/lib/modules/{release}/vmlinuz"),
                format!("lib/modules/{release}/vmlinuz"),
            ],
        )?;
        let config = find(
            "configuration",
            [
                format!("boot/config-{release}"),
                format!("usr/lib/modules/{release}/config"),
                format!("lib/modules/{release}/config"),
            ],
        )?;
        let modules = find(
            "modules folder",
            [
                format!("lib/modules/{release}/kernel"),
                format!("usr/lib/modules/{release}/kernel"),
                format!("usr/lib/modules/{release}"),
            ],
        )?;
        Ok(Kernel {
            generation,
            flavour,
            release,
            version,
            bzimage,
            config,
            modules,
        })
    }
}

/// The names of the packages that `image` depends on and that are parts of this kernel.
fn part_names(image: &Package, release: &str) -> Vec<String> {
    let end = format!("-{release}");
    let is_part = |d: &&str| d.starts_with("linux-") && d.ends_with(&end);
    image.needs().filter(is_part).map(str::to_owned).collect()
}

/// The first of `places` that exists in one of the packages.
fn first(parts: &[Package], places: &[String]) -> Option<PathBuf> {
    let at = |p: &Package, place: &String| -> PathBuf { Path::new(&p.root).join(place) };
    places
        .iter()
        .flat_map(|place| parts.iter().map(move |p| at(p, place)))
        .find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_split_kernel_are_found_by_its_release() {
        let image = Package {
            name: String::new(),
            version: String::new(),
            suite: String::new(),
            depends: "kmod, linux-base (>= 4.3~), linux-binary-9.9.1+x (= 9.9), \
                      linux-modules-9.9.1+x (= 9.9)"
                .to_owned(),
            root: PathBuf::new(),
        };
        let parts = part_names(&image, "9.9.1+x");
        assert_eq!(parts, ["linux-binary-9.9.1+x", "linux-modules-9.9.1+x"]);
    }

    #[test]
    fn flavours_are_told_apart_by_their_suffixes() {
        for (name, flavour) in [
            ("linux-image-9.9.1-amd64", Some(Flavour::Generic)),
            ("linux-image-9.9.1-cloud-amd64", Some(Flavour::Cloud)),
            ("linux-image-9.9.1-rt-amd64", Some(Flavour::Rt)),
            ("linux-image-9.9.1-amd64-dbg", None),
        ] {
            let found: Vec<_> = Flavour::ALL
                .into_iter()
                .filter(|f| f.matches(name))
                .collect();
            assert_eq!(found, flavour.into_iter().collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn generations_parse_as_they_are_displayed() {
        for generation in Generation::ALL {
            assert_eq!(
                generation.to_string().parse::<Generation>().ok(),
                Some(generation)
            );
        }
        let error = "6.2".parse::<Generation>().unwrap_err().to_string();
        assert!(error.contains("6.12"), "{error}");
    }
}
