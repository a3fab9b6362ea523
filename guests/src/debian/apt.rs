//! Runs apt with a configuration, lists and caches of our own: queries the archive, and downloads
//! packages, which apt verifies.
//!
//! This module needs no root, and changes nothing of the host. Only the mirrors' addresses and the
//! `Acquire` options (proxies, for example) are the host's. apt checks signatures against the
//! Debian archive keyring. This module must not know where packages are kept or how they are
//! unpacked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use crate::debian::error::PackageError;
use crate::host::cache::At;
use crate::host::error::ToolError;
use crate::host::{progress, tools};

/// The keys that Debian's archive is signed with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Package lists older than this are fetched again when a package is needed that is not in the
/// cache.
const MAX_LISTS_AGE: Duration = Duration::from_secs(24 * 3600);
/// The suites that packages are fetched from, each with its repository.
const SUITES: [(&str, Repository); 10] = [
    ("bullseye", Repository::Main),
    ("bullseye-security", Repository::Security),
    ("bookworm", Repository::Main),
    ("bookworm-backports", Repository::Main),
    ("bookworm-security", Repository::Security),
    ("forky", Repository::Main),
    ("sid", Repository::Main),
    ("trixie", Repository::Main),
    ("trixie-backports", Repository::Main),
    ("trixie-security", Repository::Security),
];

/// The two repositories, which have different addresses.
#[derive(Clone, Copy)]
enum Repository {
    Main,
    Security,
}

type Result<T> = std::result::Result<T, PackageError>;

/// A version of a package in a suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) suite: String,
}

/// The record of a package in apt's lists.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) version: String,
    /// The `Depends` field.
    pub(crate) depends: String,
    /// Size of the `.deb` file in bytes.
    pub(crate) size: u64,
}

/// apt, with its configuration, lists and caches in `folder`.
#[derive(Debug)]
pub(crate) struct Apt {
    pub(crate) folder: PathBuf,
}

impl Apt {
    /// Runs `resolve` after making sure that the lists are there, recent, and of all our suites. If
    /// the archive cannot be reached, old lists are used.
    pub(crate) fn with_lists<T>(&self, resolve: impl Fn() -> Result<T>) -> Result<T> {
        let age = fs::metadata(self.folder.join("updated"))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|t| SystemTime::now().duration_since(t).ok());
        if age.is_none_or(|a| a > MAX_LISTS_AGE) || !self.lists_all_suites() {
            let updated = self.update_lists();
            // apt fails if a single suite is unreachable: all that counts is whether we can
            // resolve.
            return resolve().map_err(|e| updated.err().unwrap_or(e));
        }
        resolve()
    }

    /// Whether the lists cover all suites: an older outpatch may have had fewer.
    fn lists_all_suites(&self) -> bool {
        let listed = fs::read_to_string(self.folder.join("sources.list")).unwrap_or_default();
        SUITES
            .iter()
            .all(|(suite, _)| listed.contains(&format!(" {suite} main\n")))
    }

    /// Fetches the package lists of all suites.
    pub(crate) fn update_lists(&self) -> Result<()> {
        self.configure()?;
        let bar = progress::spinner("reading Debian's package lists");
        let mut command = self.tool("apt-get")?;
        command.args(["update", "-q"]);
        let done = run(command, || bar.tick());
        bar.finish_and_clear();
        done?;
        let stamp = self.folder.join("updated");
        fs::write(&stamp, b"").at(&stamp)?;
        Ok(())
    }

    /// All versions of these packages in these suites.
    pub(crate) fn candidates(&self, names: &[String], suites: &[&str]) -> Result<Vec<Candidate>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let table = self.query("madison", names)?;
        Ok(table
            .lines()
            .filter_map(parse_madison)
            .filter(|c| suites.contains(&c.suite.as_str()))
            .collect())
    }

    /// The names of all packages that begin with `start`.
    pub(crate) fn names(&self, start: &str) -> Result<Vec<String>> {
        let names = self.query("pkgnames", &[start.to_owned()])?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The candidate with the highest version, in dpkg's order.
    pub(crate) fn newest(&self, found: Vec<Candidate>) -> Result<Option<Candidate>> {
        let mut best: Option<Candidate> = None;
        for candidate in found {
            let newer = match &best {
                None => true,
                Some(best) => self.is_newer(&candidate.version, &best.version)?,
            };
            if newer {
                best = Some(candidate);
            }
        }
        Ok(best)
    }

    fn is_newer(&self, a: &str, b: &str) -> Result<bool> {
        let mut command = self.tool("dpkg")?;
        command.args(["--compare-versions", a, "gt", b]);
        Ok(command.status().at(Path::new("dpkg"))?.success())
    }

    /// The records of these candidates, in the same order.
    pub(crate) fn records(&self, wanted: &[Candidate]) -> Result<Vec<Record>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let exact: Vec<String> = wanted.iter().map(exact).collect();
        let text = self.query("show", &exact)?;
        let records: Vec<Record> = text.split("\n\n").map(parse_record).collect();
        let of = |c: &Candidate| {
            let found = records
                .iter()
                .find(|r| r.name == c.name && r.version == c.version);
            found.cloned().unwrap_or_default()
        };
        Ok(wanted.iter().map(of).collect())
    }

    /// The packages that installing `names` from `suite` would add to this host. Packages that the
    /// host has in another version are left out.
    pub(crate) fn would_install(&self, names: &[&str], suite: &str) -> Result<Vec<Candidate>> {
        let mut command = self.tool("apt-get")?;
        command
            .args(["-s", "-q", "-o", "Dir::State::status=/var/lib/dpkg/status"])
            .args(["-o", "APT::Install-Recommends=0", "-o"])
            .arg(format!("APT::Default-Release={suite}"))
            .arg("install")
            .args(names);
        let output = run(command, || ())?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|l| parse_inst(l, suite)).collect())
    }

    /// Downloads packages into `folder`, and calls `tick` regularly meanwhile. apt verifies them
    /// against the signed lists.
    pub(crate) fn download(
        &self,
        wanted: &[&Candidate],
        folder: &Path,
        tick: impl FnMut(),
    ) -> Result<()> {
        let mut command = self.tool("apt-get")?;
        command
            .args(["download", "-q"])
            .args(wanted.iter().map(|c| exact(c)))
            .current_dir(folder);
        run(command, tick).map(drop)
    }

    /// Runs `apt-cache`.
    fn query(&self, verb: &str, arguments: &[String]) -> Result<String> {
        let mut command = self.tool("apt-cache")?;
        command.arg(verb).args(arguments);
        let output = run(command, || ())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command with our configuration. Fails if the host does not have the program.
    pub(crate) fn tool(&self, name: &str) -> Result<Command> {
        let package = if name.starts_with("apt") {
            "apt"
        } else {
            "dpkg"
        };
        if tools::find(name).is_none() {
            return Err(ToolError {
                missing: name.to_owned(),
                packages: package.to_owned(),
            }
            .into());
        }
        let mut command = tools::downloader(name);
        command.env("APT_CONFIG", self.folder.join("apt.conf"));
        Ok(command)
    }

    fn configure(&self) -> Result<()> {
        if !Path::new(KEYRING).exists() {
            return Err(ToolError {
                missing: KEYRING.to_owned(),
                packages: "debian-archive-keyring".to_owned(),
            }
            .into());
        }
        for sub in ["lists/partial", "cache/archives/partial"] {
            let path = self.folder.join(sub);
            fs::create_dir_all(&path).at(&path)?;
        }
        let dir = self.folder.display();
        let mut conf = host_acquire_options();
        for (key, value) in [
            ("Dir::Etc::sourcelist", format!("{dir}/sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::Etc::parts", "/dev/null".to_owned()),
            ("Dir::Etc::preferences", "/dev/null".to_owned()),
            ("Dir::Etc::preferencesparts", "/dev/null".to_owned()),
            ("Dir::State::Lists", format!("{dir}/lists")),
            ("Dir::State::status", format!("{dir}/status")),
            ("Dir::Cache", format!("{dir}/cache")),
            ("Acquire::Languages", "none".to_owned()),
            ("APT::Architecture", "amd64".to_owned()),
            // The cache may be in a home folder that apt's own user cannot enter. This does not
            // weaken the signature check.
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            conf.push_str(&format!("{key} \"{value}\";\n"));
        }
        let write = |name: &str, text: &str| {
            let path = self.folder.join(name);
            fs::write(&path, text).at(&path)
        };
        write("apt.conf", &conf)?;
        write("status", "")?;
        write("sources.list", &sources(&host_mirrors()))?;
        Ok(())
    }
}

/// `name=version`, as apt takes an exact version.
fn exact(candidate: &Candidate) -> String {
    format!("{}={}", candidate.name, candidate.version)
}

/// The addresses of the two repositories.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

/// The addresses that the host's own sources name.
fn host_mirrors() -> Mirrors {
    let mut text = fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    let parts = fs::read_dir("/etc/apt/sources.list.d");
    for entry in parts.into_iter().flatten().flatten() {
        text.push('\n');
        text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
    }
    mirrors_in(&text)
}

/// Finds the repositories' addresses in sources of either format: they end in `/debian` and
/// `/debian-security`.
fn mirrors_in(sources: &str) -> Mirrors {
    let find = |end: &str| {
        sources
            .lines()
            .filter(|l| !l.trim_start().starts_with('#'))
            .flat_map(str::split_whitespace)
            .map(|w| w.trim_end_matches('/'))
            .find(|w| w.starts_with("http") && w.ends_with(end))
            .map_or_else(|| format!("http://deb.debian.org{end}"), str::to_owned)
    };
    Mirrors {
        main: find("/debian"),
        security: find("/debian-security"),
    }
}

fn sources(mirrors: &Mirrors) -> String {
    SUITES
        .iter()
        .map(|(suite, archive)| {
            let uri = match archive {
                Repository::Main => &mirrors.main,
                Repository::Security => &mirrors.security,
            };
            format!("deb [signed-by={KEYRING}] {uri} {suite} main\n")
        })
        .collect()
}

/// The host's own `Acquire` options (proxies, timeouts, clock checks), as lines of an `apt.conf`.
fn host_acquire_options() -> String {
    let dump = tools::downloader("apt-config")
        .args(["dump", "Acquire"])
        .output();
    let dump = dump.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    dump.unwrap_or_default()
        .lines()
        .filter(|l| !l.contains("IndexTargets") && !l.ends_with(" \"\";"))
        .map(|l| format!("{l}\n"))
        .collect()
}

/// Parses `name | version | URI suite/component arch Packages`.
fn parse_madison(line: &str) -> Option<Candidate> {
    let mut fields = line.split('|').map(str::trim);
    let (name, version, place) = (fields.next()?, fields.next()?, fields.next()?);
    let (suite, _) = place.split_whitespace().nth(1)?.split_once('/')?;
    Some(Candidate {
        name: name.to_owned(),
        version: version.to_owned(),
        suite: suite.to_owned(),
    })
}

/// Parses `Inst name [installed version] (version origin [arch])`, from apt's simulation.
fn parse_inst(line: &str, suite: &str) -> Option<Candidate> {
    let (before, after) = line.strip_prefix("Inst ")?.split_once('(')?;
    if before.contains('[') {
        // The host has it. It may be an older version, which suffices.
        return None;
    }
    Some(Candidate {
        name: before.split_whitespace().next()?.to_owned(),
        version: after.split_whitespace().next()?.to_owned(),
        suite: suite.to_owned(),
    })
}

fn parse_record(text: &str) -> Record {
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        line.map(str::trim).unwrap_or_default()
    };
    Record {
        name: field("Package:").to_owned(),
        version: field("Version:").to_owned(),
        depends: field("Depends:").to_owned(),
        size: field("Size:").parse().unwrap_or(0),
    }
}

/// Runs a program until it ends, and calls `tick` regularly meanwhile.
pub(crate) fn run(mut command: Command, mut tick: impl FnMut()) -> Result<Output> {
    let command_line = tools::command_line(&command);
    let failed = |stderr: String| PackageError::Tool {
        command: command_line.clone(),
        stderr,
    };
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let waiting = std::thread::spawn(move || child.wait_with_output());
    while !waiting.is_finished() {
        tick();
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = match waiting.join() {
        Ok(Ok(output)) => output,
        Ok(Err(e)) => return Err(failed(e.to_string())),
        Err(_) => return Err(failed("the thread that waited for it panicked".to_owned())),
    };
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = stderr.lines().filter(|l| !l.starts_with("W:")).collect();
    Err(failed(errors.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn madison_rows_are_parsed() {
        let row = " qemu-system-x86 | 1:10.0.2+ds-2~bpo12+1 | \
                   http://deb.debian.org/debian bookworm-backports/main amd64 Packages";
        let found = parse_madison(row).expect("a row");
        assert_eq!(found.name, "qemu-system-x86");
        assert_eq!(found.version, "1:10.0.2+ds-2~bpo12+1");
        assert_eq!(found.suite, "bookworm-backports");
        assert_eq!(parse_madison("N: nothing"), None);
    }

    #[test]
    fn simulated_installs_are_parsed() {
        let line = "Inst libfdt1 (1.6.1-4+b1 Debian:12/stable [amd64])";
        let found = parse_inst(line, "bookworm").expect("a line");
        assert_eq!(
            (found.name.as_str(), found.version.as_str()),
            ("libfdt1", "1.6.1-4+b1")
        );
        let upgrade = "Inst libglib2.0-0 [2.74.6-2] (2.74.6-3 Debian:12/stable [amd64])";
        assert_eq!(parse_inst(upgrade, "bookworm"), None);
        assert_eq!(
            parse_inst("Conf libfdt1 (1.6.1-4+b1 Debian)", "bookworm"),
            None
        );
    }

    #[test]
    fn the_hosts_own_mirror_is_found_in_both_formats() {
        let deb822 = "URIs: https://mirror.example/debian\n# http://old.example/debian\n\
                      URIs: http://m.example/debian-security/\n";
        let found = mirrors_in(deb822);
        assert_eq!(found.main, "https://mirror.example/debian");
        assert_eq!(found.security, "http://m.example/debian-security");
        let line = "deb [arch=amd64] http://one.example/debian/ bookworm main";
        assert_eq!(mirrors_in(line).main, "http://one.example/debian");
        assert_eq!(
            mirrors_in("").security,
            "http://deb.debian.org/debian-security"
        );
    }

    #[test]
    fn records_are_parsed() {
        let text = "Package: busybox-static\nVersion: 1:1.35\nDepends: libc6 (>= 2), libx\n\
                    Size: 928000\nDescription: x";
        let found = parse_record(text);
        assert_eq!(
            (found.name.as_str(), found.version.as_str()),
            ("busybox-static", "1:1.35")
        );
        assert_eq!(
            (found.depends.as_str(), found.size),
            ("libc6 (>= 2), libx", 928_000)
        );
        assert_eq!(parse_record(""), Record::default());
    }
}
