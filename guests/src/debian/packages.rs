//! Fetches Debian packages by name: apt resolves, downloads and verifies them, dpkg unpacks them
//! into the cache. They are never installed.
//!
//! An index in the cache has the version that was fetched for each request; a request that is in
//! the index is not resolved again. This module must not know what is in a package.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::debian::apt::{Apt, Candidate, run};
use crate::debian::error::PackageError;
use crate::host::cache::{At, Cache, Staging, fingerprint};
use crate::host::{progress, tools};

type Result<T> = std::result::Result<T, PackageError>;

/// How many versions may be missing in the archive although its lists name them.
const MAX_MISSING_VERSIONS: usize = 3;

/// A package that is unpacked in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// The Debian version, with epoch and revision.
    pub version: String,
    /// The suite that it was fetched from.
    pub suite: String,
    /// The `Depends` field, unparsed.
    pub depends: String,
    /// The folder that it is unpacked in, which stands for `/` in the package's paths.
    pub root: PathBuf,
}

impl Package {
    /// The names in the `Depends` field; of alternatives, only the first.
    pub fn needs(&self) -> impl Iterator<Item = &str> {
        let parts = self.depends.split(',');
        parts.filter_map(|d| d.split_whitespace().next())
    }
}

/// Fetches packages of the Debian archive into a cache.
#[derive(Debug)]
pub struct Packages {
    cache: Cache,
    apt: Apt,
    /// If set, only files that match this pattern are unpacked.
    only: Option<&'static str>,
}

impl Packages {
    /// Fetches into `cache`.
    pub fn new(cache: &Cache) -> Packages {
        Packages {
            cache: cache.clone(),
            apt: Apt {
                folder: cache.root().join("apt"),
            },
            only: None,
        }
    }

    /// Unpacks only files whose path matches `pattern` (for tar's `--wildcards`), for large
    /// packages of which little is needed.
    pub fn only(self, pattern: &'static str) -> Packages {
        Packages {
            only: Some(pattern),
            ..self
        }
    }

    /// Fetches the newest version of `name` in `suites`.
    pub fn fetch(&self, name: &str, suites: &[&str]) -> Result<Package> {
        self.fetch_as(name, suites, || {
            self.apt.candidates(&[name.to_owned()], suites)
        })
    }

    /// Fetches a given version of `name` from `suites`.
    pub fn fetch_version(&self, name: &str, version: &str, suites: &[&str]) -> Result<Package> {
        self.fetch_as(&format!("{name}={version}"), suites, || {
            let mut found = self.apt.candidates(&[name.to_owned()], suites)?;
            found.retain(|candidate| candidate.version == version);
            Ok(found)
        })
    }

    /// Fetches the newest package in `suites` whose name begins with `start`, ends with `end`, and
    /// is `wanted`.
    pub fn fetch_newest(
        &self,
        start: &str,
        end: &str,
        wanted: impl Fn(&str) -> bool,
        suites: &[&str],
    ) -> Result<Package> {
        self.fetch_as(&format!("{start}*{end}"), suites, || {
            let mut names = self.apt.names(start)?;
            names.retain(|n| n.ends_with(end) && wanted(n));
            self.apt.candidates(&names, suites)
        })
    }

    /// Fetches the newest package in `suites` whose name begins with `start` and ends with `end`
    /// and `extra`, and whose main package (the name without `extra`) is there in the same version:
    /// signed packages reach the archive some days after the others.
    pub fn fetch_newest_extra(
        &self,
        start: &str,
        end: &str,
        extra: &str,
        suites: &[&str],
    ) -> Result<Package> {
        let what = format!("{start}*{end}{extra} with {start}*{end}");
        self.fetch_as(&what, suites, || {
            let mut names = self.apt.names(start)?;
            names.retain(|n| n.strip_suffix(extra).unwrap_or(n).ends_with(end));
            let found = self.apt.candidates(&names, suites)?;
            Ok(with_main_package(&found, extra))
        })
    }

    /// Fetches the libraries that `programs` need and this host lacks from `suite`. Returns a value
    /// for `LD_LIBRARY_PATH`, for programs that run from the cache.
    pub fn fetch_libraries(&self, programs: &[&Package], suite: &str) -> Result<OsString> {
        let needs = programs.iter().flat_map(|p| p.needs());
        let mut names: Vec<&str> = needs.filter(|n| n.starts_with("lib")).collect();
        names.sort_unstable();
        names.dedup();
        let packages = self.fetch_missing_libraries(&names, suite)?;
        let folders = packages.iter().flat_map(|p| {
            ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|sub| p.root.join(sub))
        });
        let folders = folders.filter(|f| f.is_dir());
        std::env::join_paths(folders).map_err(|e| PackageError::Tool {
            command: "joining the library path".to_owned(),
            stderr: e.to_string(),
        })
    }

    fn fetch_missing_libraries(&self, names: &[&str], suite: &str) -> Result<Vec<Package>> {
        let key = format!("{}@{suite}", names.join(","));
        let hash = fingerprint([key.as_bytes()]);
        let list = self.cache.root().join(format!("libraries/{hash}.json"));
        let cached = || {
            let all = read_json::<Vec<Package>>(&list)?;
            all.iter().all(|p| p.root.is_dir()).then_some(all)
        };
        if let Some(all) = cached() {
            return Ok(all);
        }
        let _lock = self.cache.lock("packages")?;
        if let Some(all) = cached() {
            return Ok(all);
        }
        let wanted = self
            .apt
            .with_lists(|| self.apt.would_install(names, suite))?;
        let all = self.download(&wanted)?;
        self.write_json(&list, &all)?;
        Ok(all)
    }

    /// Fetches the newest of the candidates that `find` returns. `what` names the request in the
    /// index.
    fn fetch_as(
        &self,
        what: &str,
        suites: &[&str],
        find: impl Fn() -> Result<Vec<Candidate>>,
    ) -> Result<Package> {
        let suffix = self
            .only
            .map_or(String::new(), |pattern| format!(":{pattern}"));
        let key = format!("{what}@{}{suffix}", suites.join(","));
        if let Some(found) = self.indexed(&key) {
            return Ok(found);
        }
        let _lock = self.cache.lock("packages")?;
        // Another process may have fetched it while we waited.
        if let Some(found) = self.indexed(&key) {
            return Ok(found);
        }
        let fetched = self.download_newest(what, suites, find)?;
        let mut index = self.index();
        index.extend(fetched.iter().map(|p| (key.clone(), p.clone())));
        self.write_json(&self.index_path(), &index)?;
        self.indexed(&key).ok_or_else(|| PackageError::Tool {
            command: format!("fetching {what}"),
            stderr: "it is no longer in the cache".to_owned(),
        })
    }

    /// Downloads the newest candidate that the archive really has: its lists can name a file that
    /// has been removed, or is not there yet.
    fn download_newest(
        &self,
        what: &str,
        suites: &[&str],
        find: impl Fn() -> Result<Vec<Candidate>>,
    ) -> Result<Vec<Package>> {
        let mut gone: Vec<Candidate> = Vec::new();
        let mut first = None;
        loop {
            let resolve = || {
                let mut found = find()?;
                found.retain(|candidate| !gone.contains(candidate));
                let newest = self.apt.newest(found)?;
                newest.ok_or_else(|| PackageError::NotFound {
                    name: what.to_owned(),
                    suites: suites.join(", "),
                    lists: self.apt.folder.join("lists"),
                })
            };
            let candidate = match self.apt.with_lists(resolve) {
                Ok(candidate) => candidate,
                Err(error) => return Err(first.unwrap_or(error)),
            };
            let error = match self.download(std::slice::from_ref(&candidate)) {
                Ok(fetched) => return Ok(fetched),
                Err(error) => error,
            };
            if !error.is_gone() || gone.len() >= MAX_MISSING_VERSIONS {
                return Err(first.unwrap_or(error));
            }
            if first.is_none() {
                // Old point versions are removed when new ones are added: try with new lists.
                self.apt.update_lists()?;
            }
            first.get_or_insert(error);
            gone.push(candidate);
        }
    }

    fn index_path(&self) -> PathBuf {
        self.cache.root().join("packages.json")
    }

    fn index(&self) -> BTreeMap<String, Package> {
        read_json(&self.index_path()).unwrap_or_default()
    }

    fn indexed(&self, key: &str) -> Option<Package> {
        self.index().remove(key).filter(|p| p.root.is_dir())
    }

    fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<()> {
        let text = serde_json::to_vec_pretty(value)
            .map_err(std::io::Error::from)
            .at(path)?;
        Ok(self.cache.write(path, &text)?)
    }

    /// The folder that a package is unpacked in.
    fn folder_of(&self, candidate: &Candidate) -> PathBuf {
        let version = candidate.version.replace(':', "%");
        let part = if self.only.is_some() { ".part" } else { "" };
        let name = format!("{}_{version}{part}", candidate.name);
        self.cache.root().join("packages").join(name)
    }

    /// Downloads and unpacks those of `wanted` that are not in the cache. The caller holds the
    /// lock.
    fn download(&self, wanted: &[Candidate]) -> Result<Vec<Package>> {
        let records = self.apt.records(wanted)?;
        let missing: Vec<&Candidate> = wanted
            .iter()
            .filter(|c| !self.folder_of(c).is_dir())
            .collect();
        if !missing.is_empty() {
            let sizes = wanted.iter().zip(&records);
            let sizes = sizes.filter(|(c, _)| missing.contains(c));
            self.download_all(&missing, sizes.map(|(_, r)| r.size).sum())?;
        }
        let package = |(candidate, record): (&Candidate, crate::debian::apt::Record)| Package {
            name: candidate.name.clone(),
            version: candidate.version.clone(),
            suite: candidate.suite.clone(),
            depends: record.depends,
            root: self.folder_of(candidate),
        };
        Ok(wanted.iter().zip(records).map(package).collect())
    }

    fn download_all(&self, missing: &[&Candidate], size: u64) -> Result<()> {
        let staging = self.cache.stage()?;
        let what = match missing {
            [one] => format!("{} {}", one.name, one.version),
            many => format!("{} packages", many.len()),
        };
        let bar = progress::bytes(&what, size);
        let tick = || bar.set_position(folder_size(staging.path()));
        self.apt.download(missing, staging.path(), tick)?;
        bar.finish_and_clear();
        for deb in debs_in(staging.path())? {
            self.unpack(&deb, missing, &staging)?;
        }
        match missing.iter().find(|c| !self.folder_of(c).is_dir()) {
            Some(c) => Err(PackageError::Tool {
                command: format!("apt-get download {}={}", c.name, c.version),
                stderr: "it succeeded but left no file of that name".to_owned(),
            }),
            None => Ok(()),
        }
    }

    fn unpack(&self, deb: &Path, wanted: &[&Candidate], staging: &Staging) -> Result<()> {
        let file = deb.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(candidate) = wanted.iter().find(|c| is_deb_of(file, c)) else {
            return Ok(());
        };
        let name = &candidate.name;
        let tree = staging.path().join(format!("{name}.tree"));
        let bar = progress::spinner(&format!("unpacking {name}"));
        let mut command = self.apt.tool("dpkg-deb")?;
        match self.only {
            None => {
                command.arg("-x").arg(deb).arg(&tree);
                run(command, || bar.tick())?;
            }
            Some(pattern) => {
                command.arg("--fsys-tarfile").arg(deb);
                unpack_part(command, pattern, &tree, || bar.tick())?;
            }
        }
        bar.finish_and_clear();
        Ok(staging.publish(&tree, &self.folder_of(candidate))?)
    }
}

/// Unpacks the files that match `pattern` of the tar archive that `from` prints.
fn unpack_part(mut from: Command, pattern: &str, tree: &Path, tick: impl FnMut()) -> Result<()> {
    fs::create_dir_all(tree).at(tree)?;
    let command_line = tools::command_line(&from);
    let mut printing = from.stdout(Stdio::piped()).spawn().at(tree)?;
    let mut tar = tools::downloader("tar");
    tar.arg("-C").arg(tree).args(["-x", "--wildcards", pattern]);
    tar.stdin(printing.stdout.take().map_or(Stdio::null(), Stdio::from));
    let unpacked = run(tar, tick);
    let status = printing.wait().at(tree)?;
    unpacked?;
    if status.success() {
        return Ok(());
    }
    Err(PackageError::Tool {
        command: command_line,
        stderr: status.to_string(),
    })
}

/// The candidates whose names end in `extra` and whose main package, the name without `extra`, is
/// among `found` in the same version.
fn with_main_package(found: &[Candidate], extra: &str) -> Vec<Candidate> {
    let is_there = |name: &str, version: &str| {
        let mut all = found.iter();
        all.any(|other| other.name == name && other.version == version)
    };
    let has_main = |candidate: &&Candidate| {
        let main = candidate.name.strip_suffix(extra);
        main.is_some_and(|main| is_there(main, &candidate.version))
    };
    found.iter().filter(has_main).cloned().collect()
}

/// Whether `file` is the file of that package. Files are called `name_version_arch.deb`, with a
/// colon in the version written as `%3a`.
fn is_deb_of(file: &str, candidate: &Candidate) -> bool {
    let (name, rest) = file.split_once('_').unwrap_or_default();
    let version = rest.split('_').next().unwrap_or_default();
    name == candidate.name && version.replace("%3a", ":") == candidate.version
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn debs_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).at(folder)?.flatten();
    let paths = entries.map(|e| e.path());
    Ok(paths
        .filter(|p| p.extension().is_some_and(|e| e == "deb"))
        .collect())
}

fn folder_size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| Some(e.metadata().ok()?.len())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_missing_in_the_archive_is_skipped() {
        let failed = |stderr: &str| PackageError::Tool {
            command: "apt-get download".to_owned(),
            stderr: stderr.to_owned(),
        };
        assert!(failed("E: Failed to fetch http://x/a.deb  404  Not Found [IP: ::1 80]").is_gone());
        assert!(!failed("E: Failed to fetch http://x/a.deb  Could not resolve 'x'").is_gone());
        let unlisted = PackageError::NotFound {
            name: "a404".to_owned(),
            suites: "sid".to_owned(),
            lists: PathBuf::from("/lists"),
        };
        assert!(!unlisted.is_gone());
    }

    #[test]
    fn files_are_matched_to_packages_by_name_and_version() {
        let candidate = Candidate {
            name: "qemu-system-x86".to_owned(),
            version: "1:10.0.2+ds-2~bpo12+1".to_owned(),
            suite: "s".to_owned(),
        };
        assert!(is_deb_of(
            "qemu-system-x86_1%3a10.0.2+ds-2~bpo12+1_amd64.deb",
            &candidate
        ));
        assert!(!is_deb_of("qemu-system-x86_1%3a7.2_amd64.deb", &candidate));
        assert!(!is_deb_of(
            "qemu-system-x86-xen_1%3a10.0.2+ds-2~bpo12+1_amd64.deb",
            &candidate
        ));
        assert!(!is_deb_of("odd", &candidate));
    }

    #[test]
    fn a_package_without_its_main_package_is_skipped() {
        let candidate = |name: &str, version: &str| Candidate {
            name: name.to_owned(),
            version: version.to_owned(),
            suite: "s".to_owned(),
        };
        let both = candidate("image-5-dbg", "9.2-1");
        let found = [
            // Its main package is there in an older version only.
            candidate("image-5-dbg", "9.2-2"),
            candidate("image-5", "9.2-1"),
            both.clone(),
            candidate("image-4", "9.1-1"),
            candidate("image-6-dbg", "9.2-3"),
        ];
        assert_eq!(with_main_package(&found, "-dbg"), [both]);
        assert_eq!(with_main_package(&[], "-dbg"), []);
    }

    #[test]
    fn only_first_alternatives_are_needed() {
        let package = Package {
            name: String::new(),
            version: String::new(),
            suite: String::new(),
            depends: "libaio1 (>= 0.3.93), libfoo2 | libfoo3, seabios".to_owned(),
            root: PathBuf::new(),
        };
        assert_eq!(
            package.needs().collect::<Vec<_>>(),
            ["libaio1", "libfoo2", "seabios"]
        );
    }
}
