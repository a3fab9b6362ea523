//! apt with a configuration, lists and caches of its own: what there is, and downloads that it verifies.
//!
//! Nothing of the machine's is touched and no root is needed; only the mirror's address and the `Acquire` options (proxies,
//! say) are the machine's. Signatures are checked against the Debian archive keyring, as always. Where things are kept and
//! how they are unpacked is not this module's business.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use crate::debian::error::PackageError;
use crate::host::cache::At;
use crate::host::error::ToolError;
use crate::host::{progress, tools};

/// Where Debian keeps the keys that sign its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How long apt's lists are good before they are fetched again, when a package is wanted that is not in the cache.
const LISTS_AGE: Duration = Duration::from_secs(24 * 3600);
/// The suites that something is taken from, with the archive that each is in.
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

#[derive(Clone, Copy)]
enum Repository {
    Main,
    Security,
}

type Result<T> = std::result::Result<T, PackageError>;

/// A version of a package that a suite has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) suite: String,
}

/// What apt's lists say of a candidate.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) depends: String,
    pub(crate) size: u64,
}

/// apt, with its files in a folder of ours.
#[derive(Debug)]
pub(crate) struct Apt {
    pub(crate) folder: PathBuf,
}

impl Apt {
    /// Runs `resolve` with lists that are there, of all our suites and young enough; old ones do when the archive cannot be
    /// reached.
    pub(crate) fn with_lists<T>(&self, resolve: impl Fn() -> Result<T>) -> Result<T> {
        let age = fs::metadata(self.folder.join("updated"))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|t| SystemTime::now().duration_since(t).ok());
        if age.is_none_or(|a| a > LISTS_AGE) || !self.lists_all_suites() {
            let updated = self.update_lists();
            // apt reports one unreachable suite as a failure of the whole: what counts is whether we can resolve.
            return resolve().map_err(|e| updated.err().unwrap_or(e));
        }
        resolve()
    }

    /// Whether the lists were fetched for the suites that we take from now: an older outpatch may have had fewer.
    fn lists_all_suites(&self) -> bool {
        let listed = fs::read_to_string(self.folder.join("sources.list")).unwrap_or_default();
        SUITES
            .iter()
            .all(|(suite, _)| listed.contains(&format!(" {suite} main\n")))
    }

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

    /// The versions of these packages in these suites.
    pub(crate) fn candidates(&self, names: &[String], suites: &[&str]) -> Result<Vec<Candidate>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let table = self.ask("madison", names)?;
        Ok(table
            .lines()
            .filter_map(parse_madison)
            .filter(|c| suites.contains(&c.suite.as_str()))
            .collect())
    }

    /// The names of packages that begin so.
    pub(crate) fn names(&self, start: &str) -> Result<Vec<String>> {
        let names = self.ask("pkgnames", &[start.to_owned()])?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The one with the highest version, as Debian counts.
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

    /// What the lists say of these, in their order.
    pub(crate) fn records(&self, wanted: &[Candidate]) -> Result<Vec<Record>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let exact: Vec<String> = wanted.iter().map(exact).collect();
        let text = self.ask("show", &exact)?;
        let records: Vec<Record> = text.split("\n\n").map(parse_record).collect();
        let of = |c: &Candidate| {
            let found = records
                .iter()
                .find(|r| r.name == c.name && r.version == c.version);
            found.cloned().unwrap_or_default()
        };
        Ok(wanted.iter().map(of).collect())
    }

    /// What installing these from `suite` would add to this machine; what it has in another version is left out.
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

    /// Downloads these into a folder, calling `tick` meanwhile. apt checks them against the signed lists.
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

    fn ask(&self, verb: &str, arguments: &[String]) -> Result<String> {
        let mut command = self.tool("apt-cache")?;
        command.arg(verb).args(arguments);
        let output = run(command, || ())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command that uses our configuration, or the news that the machine does not have it.
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
        let mut command = Command::new(name);
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
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
        let mut conf = machine_acquire_options();
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
            // The cache may be in a home that apt's own user cannot enter. It does not weaken the signature check.
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
        write("sources.list", &sources(&machine_mirrors()))?;
        Ok(())
    }
}

/// As apt takes a version: `name=version`.
fn exact(candidate: &Candidate) -> String {
    format!("{}={}", candidate.name, candidate.version)
}

/// The addresses that a machine's own sources use for the two archives.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

fn machine_mirrors() -> Mirrors {
    let mut text = fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    let parts = fs::read_dir("/etc/apt/sources.list.d");
    for entry in parts.into_iter().flatten().flatten() {
        text.push('\n');
        text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
    }
    mirrors_in(&text)
}

/// Finds the archives' addresses in sources of either format: they end in `/debian` and `/debian-security`.
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

/// The machine's own way to the archive (proxies, timeouts, clock checks), as lines of an `apt.conf`.
fn machine_acquire_options() -> String {
    let dump = Command::new("apt-config")
        .args(["dump", "Acquire"])
        .output();
    let dump = dump.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    dump.unwrap_or_default()
        .lines()
        .filter(|l| !l.contains("IndexTargets") && !l.ends_with(" \"\";"))
        .map(|l| format!("{l}\n"))
        .collect()
}

/// `name | version | URI suite/component arch Packages`
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

/// `Inst name [version that the machine has] (version where [arch])`, of apt's simulation
fn parse_inst(line: &str, suite: &str) -> Option<Candidate> {
    let (before, after) = line.strip_prefix("Inst ")?.split_once('(')?;
    if before.contains('[') {
        // The machine has it, if not the newest: that does.
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

/// Runs a tool to its end, calling `tick` meanwhile.
pub(crate) fn run(mut command: Command, mut tick: impl FnMut()) -> Result<Output> {
    let shown = tools::command_line(&command);
    let failed = |stderr: String| PackageError::Tool {
        command: shown.clone(),
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
        Err(_) => return Err(failed("the thread that waited for it died".to_owned())),
    };
    if output.status.success() {
        return Ok(output);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: Vec<&str> = words.lines().filter(|l| !l.starts_with("W:")).collect();
    Err(failed(words.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn madison_rows_are_read() {
        let row = " qemu-system-x86 | 1:10.0.2+ds-2~bpo12+1 | http://deb.debian.org/debian bookworm-backports/main amd64 Packages";
        let found = parse_madison(row).expect("a row");
        assert_eq!(found.name, "qemu-system-x86");
        assert_eq!(found.version, "1:10.0.2+ds-2~bpo12+1");
        assert_eq!(found.suite, "bookworm-backports");
        assert_eq!(parse_madison("N: nothing"), None);
    }

    #[test]
    fn simulated_installs_are_read() {
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
    fn the_machines_own_mirror_is_taken_from_both_formats() {
        let deb822 = "URIs: https://mirror.example/debian\n# http://old.example/debian\nURIs: http://m.example/debian-security/\n";
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
    fn records_are_read() {
        let text = "Package: busybox-static\nVersion: 1:1.35\nDepends: libc6 (>= 2), libx\nSize: 928000\nDescription: x";
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
